"""LaMamba-Diff: the network, its diffusion process, its autoencoder and its training."""
