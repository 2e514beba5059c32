"""How the examples are run for the gallery: in what order, how long, and their picture.

Each example runs as its reader would run it. A whole run takes up to three minutes, so
`make docs` makes them short, by the flags below. `make docs GALLERY=full` runs them as
they are, for a site that is published. Every page says which command made it.
"""

import os
import shutil
from pathlib import Path

import jax
from jax.extend.backend import clear_backends

MADE = Path(__file__).resolve().parents[1] / "made" / "gallery"
IS_FULL = os.environ.get("GALLERY") == "full"
os.environ["TQDM_DISABLE"] = "1"  # a page is no place for a progress bar
# The order of the gallery, and the flags of a short run.
EXAMPLES = {
    "linear_combinations.py": "--lines 50",
    "digits.py": "--steps 600",
    "contrastive.py": "--steps 4 --images 256 --chunk 64",
    "private_digits.py": "--steps 30",
    "noise_scale.py": "--steps 200",
    "language_model.py": "--steps 80",
    "two_tasks.py": "--steps 150",
    "every_example.py": "--steps 60",
    "attribution.py": "--steps 100",
    "kernels.py": "--steps 100 --seeds 12 --labels 50 400",
    "second_order.py": "--steps 4",
    "weights.py": "--steps 150",
    "multi_device.py": "--steps 100",
}


def place(filename: str) -> int:
    """Where an example stands in the gallery."""
    return list(EXAMPLES).index(Path(filename).name)


def _steps(name: str) -> list[str]:
    return [] if IS_FULL else EXAMPLES[name].split()


def _simulate_devices(count: int) -> None:
    """As JAX_NUM_CPU_DEVICES does for a process that starts."""
    jax.clear_caches()
    clear_backends()
    jax.config.update("jax_num_cpu_devices", count)


def flags(gallery_conf: dict, script_vars: dict) -> list[str]:
    """The command line that an example sees."""
    source = Path(script_vars["src_file"])
    if source.name == "multi_device.py":
        _simulate_devices(8)
    MADE.mkdir(parents=True, exist_ok=True)
    drawn = os.path.relpath(MADE / f"{source.stem}.png", source.parent)
    return [*_steps(source.name), "--output", drawn]


def picture(block: tuple, block_vars: dict, gallery_conf: dict) -> str:
    """The picture that an example has drawn, and the command, as text of its page."""
    source = Path(block_vars["src_file"])
    if block[0] != "code" or "__main__" not in block[1]:
        return ""
    command = " ".join([f"python examples/{source.name}", *_steps(source.name)])
    if source.name == "multi_device.py":
        command = f"JAX_NUM_CPU_DEVICES=8 {command}"
    rst = f".. container:: made-by\n\n   Made by ``{command}``\n\n"
    drawn = MADE / f"{source.stem}.png"
    if not drawn.exists():  # it has failed, and sphinx-gallery says so
        return rst
    page = Path(next(block_vars["image_path_iterator"]))
    shutil.copyfile(drawn, page)
    where = "/" + page.relative_to(MADE.parents[1]).as_posix()
    return rst + f".. image:: {where}\n   :alt: what {source.name} draws\n\n"
