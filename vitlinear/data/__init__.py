"""Images with labels: data sets, readers, loaders, and what becomes of unreadable files."""
