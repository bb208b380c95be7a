"""A check of how channels divide into heads."""


def split_heads(dim: int, num_heads: int, multiple: int = 1) -> int:
    """Channels of a head, D.

    Args:
        dim: Channels, C.
        num_heads: Heads, h.
        multiple: D must be a multiple of this.

    Raises:
        ValueError: C does not divide into h heads of such a number of channels.
    """
    if num_heads < 1 or dim % num_heads or dim // num_heads % multiple:
        of = f" of a multiple of {multiple} channels" if multiple > 1 else ""
        raise ValueError(f"dim {dim} does not divide into {num_heads} heads{of}")
    return dim // num_heads
