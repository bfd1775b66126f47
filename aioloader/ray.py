"""Work on a Ray cluster: what `executor=` takes. Importing this module does not import Ray.

```python
from aioloader.ray import RayWorkers

loader = Pipeline(keys).map(decode, executor=RayWorkers(cpus=1), concurrency=32).batch(64)
```
"""

from aioloader.executors.ray.pool import RayPool
from aioloader.executors.ray.workers import RayWorkers

__all__ = ["RayPool", "RayWorkers"]
