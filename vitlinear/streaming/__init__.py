"""Images larger than memory: a model runs on bands of rows, with the results of the whole image."""

from .stream import stream as stream
from .views import PCA as PCA
from .views import Head as Head
