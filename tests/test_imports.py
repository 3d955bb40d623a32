"""Importing any module has no side effects: no flags, no devices, no TensorFlow, no torch."""

import pkgutil
import subprocess
import sys

import clsl_jax

MODULES = sorted(module.name for module in pkgutil.walk_packages(clsl_jax.__path__, "clsl_jax."))

PROGRAM = """
import sys
from absl import flags
import importlib

asked = set()

class NoTorch:
    # As if torch were not installed.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            asked.add(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
for name in sys.argv[1:]:
    importlib.import_module(name)
    # Libraries define flags of their own (absl.logging, TFDS); none may be this package's.
    where = flags.FLAGS.find_module_defining_flag
    own = [n for n in flags.FLAGS if where(n).startswith("clsl_jax")]
    assert not own, (name, own)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was started"
assert "tensorflow" not in sys.modules
assert not asked, f"torch is imported where it is installed: {asked}"
from clsl_jax.losses import asymmetric_loss
print(float(asymmetric_loss(0.0, 1.0)))
"""


def test_imports():
    assert len(MODULES) > 20
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MODULES], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # log 2, the cross-entropy of an even guess: gamma of positives is 0.
    assert abs(float(done.stdout) - 0.6931472) < 1e-6
