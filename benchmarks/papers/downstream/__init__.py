"""Downstream tasks of the demo models, which are not what they were pre-trained on.

Scenes in other shades, layouts and wording for retrieval and captioning, questions about them, and
three sets of images to classify for a small ViT; handwriting that is real and split by scan.
"""
