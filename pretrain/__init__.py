"""The training stages: the pretraining loop at the root, further stages in sub-folders."""
