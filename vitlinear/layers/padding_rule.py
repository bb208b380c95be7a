"""Rules by which layers keep padding out; every layer that mixes tokens names its own.

Its attribute ``padding_rule`` is one of the names below; `vitlinear.dense.padding` acts on it. A
layer with a rule answers for the modules inside it. Layers that treat each token by itself need
none, and convolutions without one find zeros in padding.
"""

# The layer takes ``key_padding_mask``, True for padding: [B, H, W] for a map [B, H, W, C]; [B, N]
# for tokens [B, N, C] that are followed by height and width of the map among them.
MASK = "mask"
# The same for a map [B, C, H, W].
MASK_CHANNELS_FIRST = "mask, channels first"
# The layer takes ``valid_sizes``: height and width of the part of each map that is no padding. Its
# first arguments are as for `MASK`.
SIZES = "sizes"
# Padding of the layer's first argument, a map [B, H, W, C], is set to zero.
ZEROS = "zeros"
# The same for a map [B, C, H, W].
ZEROS_CHANNELS_FIRST = "zeros, channels first"
