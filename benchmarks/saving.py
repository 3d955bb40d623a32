"""How long a checkpoint keeps training waiting, on several devices of one host.

    PYTHONPATH=. python benchmarks/saving.py [--backbone=resnet18] [--devices=8] [--rounds=5]

Weights, their EMA and the optimizer's moments lie whole on each device. By Orbax's default all
devices share the writing of every array that they can divide; the program's checkpoints share only
those of which each host then writes `checkpoint.LEAST_SHARE` bytes or more. "Blocked" is until
`Checkpointer.save` returns and the next step may start, "whole" until everything is on disk; the
two ways take turns.
"""

import argparse
import os
import pathlib
import tempfile
import time


def main() -> None:
    """Parses the command line, saves, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--devices", type=int, default=8, help="of the CPU, simulated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    measure(options)


def measure(options: argparse.Namespace) -> None:
    """Saves one state by both ways in turn, after a save of each that is not counted."""
    import jax
    import new_state
    import rounds

    from clsl_jax import checkpoint
    from clsl_jax.models.clsl import CLSL

    model = CLSL(num_classes=20, backbone=options.backbone, rank=1024)
    drawn = new_state.inputs(1, 64, 20)
    state = new_state.on_all_devices(model, drawn["embeddings"], drawn["annotations"])
    leaves = jax.tree.leaves(state)
    size = sum(leaf.nbytes for leaf in leaves) / 2**20
    shares = {
        "all that can be divided (Orbax's default)": 0,
        f"of {checkpoint.LEAST_SHARE:,} bytes or more": checkpoint.LEAST_SHARE,
    }
    found = {name: {"blocked": [], "whole": []} for name in shares}
    with tempfile.TemporaryDirectory() as directory:
        savers = {
            name: checkpoint.Checkpointer(os.path.join(directory, str(least)), least_share=least)
            for name, least in shares.items()
        }
        for step in range(options.rounds + 1):
            for name, saver in savers.items():
                start = time.perf_counter()
                saver.save(state, step=step, meta={}, selection=None)
                blocked = time.perf_counter()
                saver.wait()
                if step:
                    found[name]["blocked"].append(1e3 * (blocked - start))
                    found[name]["whole"].append(1e3 * (time.perf_counter() - start))
        for saver in savers.values():
            saver.close()
    sums = rounds.alternate({"checksums": lambda: checkpoint.checksums(state)}, options.rounds)[
        "checksums"
    ]
    rows = {
        name: {kind: rounds.spread(times) for kind, times in kinds.items()}
        for name, kinds in found.items()
    }
    title = (
        f"{options.backbone}'s state, {len(leaves):,} arrays, {size:,.0f} MiB, on "
        f"{options.devices} devices"
    )
    table = [
        (name, rounds.milliseconds(row["blocked"], 0), rounds.milliseconds(row["whole"], 0))
        for name, row in rows.items()
    ]
    table.append(("(checksums alone, in both)", rounds.milliseconds(sums, 0), ""))
    print(rounds.markdown(title, ("arrays shared", "blocked, ms", "whole, ms"), table))
    rounds.write(
        options.json, {"machine": rounds.machine(), "title": title, "rows": rows, "checksums": sums}
    )


if __name__ == "__main__":
    main()
