"""Training on latents: `config` says what, `run` does it, with the help of the other modules."""
