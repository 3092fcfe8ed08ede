"""How good the world's models are."""
