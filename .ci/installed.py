"""Check an installed rosa_func without any extra: python installed.py ENVIRONMENT."""

import doctest
import importlib.metadata
import sys
from pathlib import Path

import torch

import rosa_func
from rosa_func import cycle, forward, optim

environment = Path(sys.argv[1]).resolve()
place = Path(rosa_func.__file__).resolve().parent
assert place.is_relative_to(environment), f"{place} is not in {environment}"
assert (place / "py.typed").is_file(), "py.typed is missing: the types would not count"

package = importlib.metadata.distribution("rosa-func")
assert package.version == rosa_func.__version__, (package.version, rosa_func.__version__)
tops = {path.parts[0] for path in package.files or ()}
assert tops == {"rosa_func", f"rosa_func-{package.version}.dist-info"}, tops

for module in (rosa_func, cycle, forward, optim):
    result = doctest.testmod(module)
    assert result.attempted, f"{module.__name__} has no examples"
    assert not result.failed, f"{result.failed} examples of {module.__name__} failed"

state = rosa_func.init(torch.nn.Sequential(torch.nn.Linear(6, 4)), r=2)
for extra, use in {
    "checkpoint": lambda: rosa_func.checkpoint.save("state.safetensors", state),
    "trainer": lambda: rosa_func.trainer,
}.items():
    try:
        use()
    except ModuleNotFoundError as error:
        assert f'pip install "rosa-func[{extra}]"' in str(error), error
    else:
        raise AssertionError(f"it went without the extra {extra}, which this environment lacks")
print(f"rosa_func {package.version} in {place}: as it should be")
