"""One image over several processes: each has some of its rows, and all compute what one would.

A `DeviceMesh` says which processes share an image. Every one of them runs the same model on its own
rows; layers that look further exchange what they need::

    mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("data", "rows"))
    parallelize(model, mesh["rows"])  # raises if it holds a layer that cannot be split
    model = DistributedDataParallel(model)  # or fully_shard, over all processes
    shard, rows = shard_rows(images, mesh["rows"])
    with rows:
        loss = criterion(model(shard), labels)
        loss.backward()
    whole = gather_rows(feature_map, rows)

The loss of all processes together is the sum of what they call ``backward`` on. Gradients of
parameters are those of one process after a mean over all processes, which is what
`DistributedDataParallel` and ``fully_shard`` take:

- A loss of logits, which are the same on every process, is computed by each of them alike.
- A loss of a map is that of the own rows: their sum, times the number of processes that share the
  image, divided by the number of terms of the whole image.
- The gradient of an image is n times that of one process, n being the number of its processes.

Every process has to call ``backward`` on every output that one of them calls it on, times 0 if need
be: the backward pass exchanges rows too. `split_rows` cuts an image of a height that is not there
as a whole; each process then reads its own rows alone.
"""

from .parallelize import parallelize as parallelize
from .shards import ImageRows as ImageRows
from .shards import gather_rows as gather_rows
from .shards import shard_rows as shard_rows
from .shards import split_rows as split_rows
