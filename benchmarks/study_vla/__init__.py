"""One policy that sees, is told what to do, and learns six tasks at once by acting."""
