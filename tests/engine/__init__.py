"""The diffusion engine on tiny models of every family."""
