"""Eight virtual CPU devices for every test, compiled quickly; set before JAX starts."""

import os

# Most of the suite's time would be LLVM's; programs that tests start in processes of their own are
# compiled as they are for users.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
