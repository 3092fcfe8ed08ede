"""Knowledge about model families, and only here: where attention is, what its tokens are, how to reach it."""
