"""Pairs of imperfect policies, composed: does the composition beat the better of the two?"""
