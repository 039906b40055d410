"""Decoding, cropping and augmentation of images."""
