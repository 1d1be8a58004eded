"""Training an f8 autoencoder on views of places: `config` says what, `run` does it, `measures` judges it, and
`command` is its command line.
"""
