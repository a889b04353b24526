"""Finds cases by their files: every `NAME.config.json` in the folder with a weights or a flux file."""

from pathlib import Path

COMMITTED = Path(__file__).parents[1] / "fixtures" / "conformance"
KINDS = {"patch_latent_case": "weights", "controlnet_case": "flux"}


def pytest_generate_tests(metafunc):
    for fixture in KINDS.keys() & set(metafunc.fixturenames):
        folder = Path(metafunc.config.getoption("--cases") or COMMITTED)
        configs = sorted(folder.glob("*.config.json"))
        assert configs, f"{folder}: no *.config.json there"
        cases = [c.with_name(c.name.removesuffix(".config.json")) for c in configs]
        cases = [c for c in cases if c.with_name(f"{c.name}.{KINDS[fixture]}.safetensors").exists()]
        metafunc.parametrize(fixture, cases, ids=lambda case: case.name)
