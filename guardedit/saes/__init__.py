"""Sparse autoencoders: gather activations, train, calibrate, grade, label, save and load them.

texts        a folder of text -> rows of tokens, split into train, calibrate and test by document
gather       rows -> activations of several hooks in one forward pass, in shards on disk
train        shards -> a TopK autoencoder with SAELens' trainer, resumable
calibrate    TopK -> JumpReLU with one fixed threshold a latent
quality      the card: explained variance, L0, loss recovered, controls
plan         what to train on what, and where it is kept
grade        fills in the card
labels       what each latent fires on
checkpoints  folders in SAELens' format, read without SAELens, every byte checked
command      all of it in order: what `guardedit sae train|evaluate|show` call
"""
