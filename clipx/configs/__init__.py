"""The configs that come with clipx: `--config=clip:small`, `from clipx.configs import common`.

A wheel carries them in this folder. In a checkout this folder holds nothing but this file, and they
are read from `configs/`, beside `clipx/`.
"""

import pathlib

_HERE = pathlib.Path(__file__).absolute().parent
FOLDER = _HERE if (_HERE / "common.py").is_file() else _HERE.parents[1] / "configs"
__path__ = [str(FOLDER)]
