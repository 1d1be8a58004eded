"""How good generated images are: files of samples, distances between sets of images, a judge of classes,
nearest views.

`model/evaluate.py` puts the parts together; `command` is its command line.
"""
