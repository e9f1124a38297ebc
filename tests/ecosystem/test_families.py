"""`lightning` and `pytorch_lightning`: one callback for both, whichever import comes first; neither is loaded too early."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PREAMBLE = "import sys\ndef loaded(): return [m for m in ('lightning', 'pytorch_lightning', 'rich') if m in sys.modules]\n"


def python(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


def test_importing_a_callback_loads_no_lightning_and_constructing_one_loads_lightning_alone():
    code = """
    import lipguard
    from lipguard import LipschitzMonitor
    from lipguard.callbacks import CertifiedAccuracy, CheckpointAuditor, LipschitzRegularizer
    import lipguard.callbacks.base, lipguard.callbacks.projection
    print(loaded())
    early = LipschitzMonitor()
    print("lightning" in sys.modules, "pytorch_lightning" in sys.modules)
    import lightning as L, pytorch_lightning as pl
    late = LipschitzMonitor()
    print(*(isinstance(monitor, family.Callback) for monitor in (early, late) for family in (L, pl)))
    """
    assert python(code) == ["[]", "True False", "True True True True"]


def test_pytorch_lightning_is_loaded_where_it_alone_is_installed():
    code = """
    sys.modules["lightning"] = None
    from lipguard import LipschitzMonitor
    monitor = LipschitzMonitor()
    import pytorch_lightning as pl
    print(isinstance(monitor, pl.Callback))
    """
    assert python(code) == ["True"]


def test_no_family_is_an_error_that_says_what_to_install():
    code = """
    sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None
    from lipguard import LipschitzMonitor
    try:
        LipschitzMonitor()
    except ModuleNotFoundError as error:
        print(error)
    """
    assert "pip install lightning" in python(code)[0]


def test_a_callback_imported_first_belongs_to_pytorch_lightning_loaded_later():
    code = """
    import copy, pickle, torch
    from lipguard import LipschitzEarlyStopping, LipschitzMonitor
    import pytorch_lightning as pl
    from pytorch_lightning.cli import LightningCLI
    print(type(LipschitzMonitor()).__name__, "lightning" in sys.modules)

    class Net(pl.LightningModule):
        pass

    for path in ("lipguard.LipschitzMonitor", "lipguard.callbacks.LipschitzMonitor"):
        args = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.callbacks+={path}"]
        cli = LightningCLI(Net, run=False, args=args, save_config_callback=None)
        assert any(isinstance(c, LipschitzMonitor) for c in cli.trainer.callbacks)
    assert isinstance(LipschitzMonitor(), pl.Callback) and issubclass(LipschitzEarlyStopping, pl.Callback)
    assert isinstance(pickle.loads(pickle.dumps(copy.deepcopy(LipschitzMonitor(prefix="a")))), pl.Callback)
    pl.Trainer(callbacks=LipschitzMonitor(), logger=False, accelerator="cpu")
    """
    assert python(code)[0] == "LipschitzMonitor False"  # jsonargparse, which reads annotations, loads it later
