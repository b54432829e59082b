"""ich: Hydra-orchestrated sweeps of image classifiers for intracranial hemorrhage on head CT."""

import os as _os

__version__ = "0.1.0"

# torch's threads wait for one another by spinning, 300,000 times by default in GNU's OpenMP (env.c
# of libgomp), which it brings. Where another process takes a core, they spin its share away, and a
# training falls to a fraction. 3,000 is by measurement: `ich bench --parts busy`; results are the
# same bit for bit. Here, since it is read once, when torch is loaded.
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "3000")
