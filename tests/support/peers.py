"""Other libraries' own code, for golden tests of our exports and imports."""

import importlib
import sys
import types
from types import SimpleNamespace


def dictionary_learning() -> SimpleNamespace:
    """dictionary_learning's modules `dictionary`, `utils` and its trainers `top_k`, `batch_top_k`, `matryoshka`.

    Importing the package needs nnsight, for what is not tested here; an empty module stands in where it is absent.
    """
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stub = types.ModuleType("nnsight")
        stub.LanguageModel = object
        sys.modules["nnsight"] = stub
    names = {
        "dictionary": "dictionary",
        "utils": "utils",
        "top_k": "trainers.top_k",
        "batch_top_k": "trainers.batch_top_k",
        "matryoshka": "trainers.matryoshka_batch_top_k",
    }
    return SimpleNamespace(
        **{name: importlib.import_module(f"dictionary_learning.{module}") for name, module in names.items()}
    )
