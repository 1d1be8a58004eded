"""How good generated images are: files of samples, distances between sets of images, a judge of classes,
nearest views.

`evaluation` puts the parts together; `command` is its command line.
"""
