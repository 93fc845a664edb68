import errno
import re
from pathlib import Path

import pytest
import tensorflow as tf

import job.recipes
from job import registry
from job.config import UserError
from job.recipes import get_recipe
from job.registry import SHIPPED, explaining_user_code, recipe_defaults
from tests.conftest import REPOSITORY

CHANGED = """from dataclasses import replace
from job.recipes.classic import RECIPE as CLASSIC
RECIPE = replace(CLASSIC, build_model=lambda seed: None)
"""


# Python 3.11.2 raises a ValueError, 3.11.7 a SyntaxError.
try:
    compile("\0", "", "exec")
except (SyntaxError, ValueError) as error:
    NULL_BYTE_ERROR = type(error).__name__


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("syntax", "SIZE = 3\nRECIPE = (", ", line 2: SyntaxError: '(' was never closed"),
        ("name", "SIZE = 3\nlayers.Dense(SIZE)", ", line 2: NameError: name 'layers' is not"),
        ("missing", "import nowhere", ", line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("zero", "\0", f": {NULL_BYTE_ERROR}: source code string cannot contain null bytes"),
        (
            "signature",
            CHANGED,
            ", line 3: TypeError: received build_model(seed), expected build_model(seed, classes);",
        ),
        ("kind", "RECIPE = 5", " defines RECIPE as int, expected Recipe;"),
    ],
)
def test_an_error_in_a_users_recipe_is_reported_with_its_location(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, message: str
) -> None:
    folder = tmp_path / "job" / "recipes"
    folder.mkdir(parents=True)
    (folder / f"own_{name}.py").write_text(code)
    monkeypatch.setattr(registry, "_PACKAGE", folder.parent)
    monkeypatch.setattr(job.recipes, "__path__", [*job.recipes.__path__, str(folder)])
    with pytest.raises(UserError, match=re.escape(f"job/recipes/own_{name}.py{message}")):
        get_recipe(f"own_{name}")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("DEFAULTS = {'epochs': 3.5}", ", line 1: DEFAULTS is {'epochs': 3.5}, expected a"),
        ("DEFAULTS = {'epochs': True}", ", line 1: DEFAULTS is {'epochs': True}, expected"),
        ("DEFAULTS = {'seed': 1}", ", line 1: DEFAULTS is {'seed': 1}, expected a dictionary"),
        ("DEFAULTS = {'learning_rate': 0.0}", ", line 1: DEFAULTS is {'learning_rate': 0.0}, "),
        ("\nDEFAULTS: dict = dict(epochs=8)", ", line 2: DEFAULTS is dict(epochs=8), expected a"),
        ("DEFAULTS = [2**5]", ", line 1: DEFAULTS is [2 ** 5], expected a dictionary with numbers"),
        ("DEFAULTS = {", ", line 1: SyntaxError: '{' was never closed"),
    ],
)
def test_invalid_defaults_are_reported_with_their_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "job" / "recipes").mkdir(parents=True)
    path = tmp_path / "job" / "recipes" / "mine.py"
    path.write_text(code)
    monkeypatch.setattr(registry, "_PACKAGE", tmp_path / "job")
    with pytest.raises(UserError, match=re.escape(f"job/recipes/mine.py{message}")):
        recipe_defaults("mine")
    path.write_text('import nowhere\nDEFAULTS = {"learning_rate": 1, "epochs": 3}\n')
    assert recipe_defaults("mine") == {"learning_rate": 1, "epochs": 3}
    path.write_text("DEFAULTS: dict[str, float] = {'batch_size': 5}\n")
    assert recipe_defaults("mine") == {"batch_size": 5}
    path.write_text("import nowhere\n")
    assert recipe_defaults("mine") == {}


def test_every_module_of_the_package_is_listed_as_shipped() -> None:
    for package, names in SHIPPED.items():
        modules = (REPOSITORY / "job" / package).glob("*.py")
        assert sorted(path.stem for path in modules) == sorted(names)


OWN = Path(registry.__file__).parent / "recipes" / "mine.py"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("can't start new thread"),
        tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"),
        RuntimeError(f'CUDA_ERROR_ILLEGAL_ADDRESS, defined at File "{OWN}", line 12'),
    ],
)
def test_an_error_of_the_machine_is_not_attributed_to_a_users_recipe(error: Exception) -> None:
    with pytest.raises(type(error)), explaining_user_code(None if "CUDA" in str(error) else OWN):
        raise error


def test_the_advice_for_a_path_that_a_users_data_set_cannot_find() -> None:
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/x.npy")
    with (
        pytest.raises(UserError, match=r"No such file .*; use another path, or fix the file"),
        explaining_user_code(OWN),
    ):
        raise missing
