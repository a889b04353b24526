"""Cases are found by their files: every `NAME.config.json` of the folder that has a weights or a flux file."""

from pathlib import Path

COMMITTED = Path(__file__).parents[1] / "fixtures" / "conformance"


def pytest_generate_tests(metafunc):
    if "patch_latent_case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--cases") or COMMITTED)
        configs = sorted(folder.glob("*.config.json"))
        assert configs, f"{folder}: no *.config.json there"
        cases = [c.with_name(c.name.removesuffix(".config.json")) for c in configs]
        cases = [c for c in cases if c.with_name(f"{c.name}.weights.safetensors").exists()]
        metafunc.parametrize("patch_latent_case", cases, ids=lambda case: case.name)
