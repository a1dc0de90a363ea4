"""Action tokenizers: what is read back, how far off it is, and what padding counts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embodied.core.config import component
from embodied.core.errors import ConfigError
from embodied.core.registry import names

HORIZON = 8
CHUNKS = arrays(np.float32, (2, HORIZON, 3), elements=st.floats(-1, 1, width=32))


def made(name, horizon=HORIZON, **options):
    cls, config = component("tokenizers", {"name": name, **options}, "policy.tokenizer")
    return cls(config, horizon)


@pytest.mark.parametrize("name", names("tokenizers"))
@given(x=CHUNKS)
@settings(max_examples=40, deadline=None)
def test_tokens_are_in_the_vocabulary_and_stand_for_themselves(name, x):
    tokenizer = made(name)
    tokens = tokenizer.encode(torch.from_numpy(x))
    assert tokens.shape == (2, tokenizer.rows, 3) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocabulary
    again = tokenizer.decode(tokens)
    assert again.shape == x.shape
    if np.abs(again.numpy()).max() <= 1:
        assert torch.equal(tokenizer.encode(again), tokens)


@given(x=CHUNKS, bins=st.integers(2, 300))
@settings(max_examples=60, deadline=None)
def test_bins_are_off_by_no_more_than_half_of_their_distance(x, bins):
    tokenizer = made("bins", bins=bins)
    error = np.abs(tokenizer.decode(tokenizer.encode(torch.from_numpy(x))).numpy() - x)
    assert error.max() <= 1 / (bins - 1) + 1e-6


def test_bins_hold_both_bounds_and_an_odd_count_holds_zero():
    tokenizer = made("bins", bins=9)
    x = torch.tensor([[[-1.0], [0.0], [1.0], [7.0]]])
    assert tokenizer.encode(x).flatten().tolist() == [0, 4, 8, 8]
    assert tokenizer.decode(tokenizer.encode(x)).flatten().tolist() == [-1, 0, 1, 1]


@given(x=CHUNKS, scale=st.floats(1, 50), share=st.floats(0.1, 1))
@settings(max_examples=60, deadline=None)
def test_the_transforms_error_is_what_it_left_out_and_what_it_rounded(x, scale, share):
    """Parseval: squares of the error are those of the coefficients' errors."""
    tokenizer = made("dct", scale=scale, share=share)
    k, i = np.mgrid[:HORIZON, :HORIZON]
    basis = math.sqrt(2 / HORIZON) * np.cos(math.pi * k * (i + 0.5) / HORIZON)
    basis[0] /= math.sqrt(2)
    left_out = np.square(basis[tokenizer.rows :] @ x.astype(np.float64)).sum(axis=1)
    read = tokenizer.decode(tokenizer.encode(torch.from_numpy(x))).numpy()
    error = np.square(read.astype(np.float64) - x).sum(axis=1)
    assert (error >= left_out - 1e-4).all()
    assert (error <= left_out + tokenizer.rows / (4 * scale**2) + 1e-4).all()


def test_a_cosine_is_one_token_and_a_constant_the_lowest_frequency():
    tokenizer = made("dct", scale=100.0, share=1.0)
    middle = tokenizer.encode(torch.zeros(1, HORIZON, 1))[0, 0, 0].item()
    steps = torch.arange(HORIZON) + 0.5
    for k, size in ((0, math.sqrt(HORIZON)), (3, math.sqrt(HORIZON / 2))):
        x = torch.cos(math.pi * k * steps / HORIZON)[None, :, None]
        tokens = tokenizer.encode(x).flatten() - middle
        assert tokens[k] == round(100 * size) and tokens.count_nonzero() == 1


def test_padding_counts_by_the_step_or_by_its_share_of_the_chunk():
    pad = torch.tensor([[False] * 8, [False] * 6 + [True] * 2, [True] * 8])
    assert torch.equal(made("bins").weights(pad), (~pad).float())
    expected = torch.tensor([1.0, 0.75, 0.0])[:, None].expand(3, 4)
    assert torch.equal(made("dct").weights(pad), expected)
    assert (made("bins").settled(3), made("dct").settled(3)) == (3, 0)


def test_the_rows_that_are_kept():
    assert [made("dct", horizon=h, share=0.5).rows for h in (1, 2, 8, 9)] == [1, 1, 4, 4]
    assert made("bins", horizon=5).rows == 5
    with pytest.raises(ConfigError, match=r"'policy.tokenizer.bin'.*'policy.tokenizer.bins'"):
        made("bins", bin=3)
