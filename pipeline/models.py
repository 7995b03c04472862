"""Where a model's weights are: a folder, a hub name, or the package that carries them."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

from pipeline.errors import UserError
from pipeline.study import ModelName


def local_model(model: ModelName, cache: Path) -> Path:
    """A folder that transformers and vLLM load.

    `package:NAME@VERSION` is a GGUF file inside an installed package, converted once to safetensors in the cache;
    an absolute path is itself; anything else is a name on the Hugging Face hub, whose snapshot is fetched by revision.
    """
    if model.name.startswith("package:"):
        return _from_package(model, cache)
    if Path(model.name).is_absolute():
        if not (Path(model.name) / "config.json").is_file():
            raise UserError(f"model {model.name}: no config.json there; wanted a folder as save_pretrained writes it")
        return Path(model.name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.name, revision=model.revision))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model.name}: cannot be fetched from the hub ({error}); give a folder, or fetch it beforehand") from error


def package_file(model: ModelName) -> Path:
    """The GGUF file of a `package:` model. Raises UserError where the package is missing or of another version."""
    package = model.name.removeprefix("package:")
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"model {model.name}: package {package} is not installed; `make` installs it from images/locks/laptop.txt") from None
    if model.revision is not None and model.revision != version:
        raise UserError(f"model {model}: version {version} is installed; install {model.revision} or change the study's revision")
    # The package's own import wants a library that is not needed for the weights, so it is only located.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    folder = Path((spec.submodule_search_locations or [""])[0]) if spec else Path()
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model {model.name}: wanted one .gguf file in {folder}, found {len(files)}; reinstall the package")
    return files[0]


def _from_package(model: ModelName, cache: Path) -> Path:
    source = package_file(model)
    target = cache / "models" / f"{model.name.removeprefix('package:')}-{metadata.version(model.name.removeprefix('package:'))}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        _convert(source, work)
        work.rename(target)
    except OSError as error:
        if not (target / "config.json").is_file():  # otherwise another process was first
            raise UserError(f"model {model.name}: cannot be read from {source} or written to {target} ({error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _convert(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights stay packed and cannot be saved.
    config = GgufConfig(gguf_file=source.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, quantization_config=config, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF reader takes the first special token for the end of a turn; the model's configuration knows better.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
