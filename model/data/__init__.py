"""Training data: what turns files on disk into batches of images and labels."""
