"""The shell script that starts one node's ranks, and what all manifests have in common."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import yaml

from ...recipes.secrets import redact
from ..errors import SlurmError
from ..job import Job
from ..script import render
from ..site import Container, Site

PORT = 29500
"""Port of node 0. Every pod and task has a network address of its own."""
TEMPLATE = "node.sh.jinja"
LONGEST_NAME = 40
"""Of a run's name: Kubernetes appends indices and a suffix, and allows 63 characters."""


SECRET = re.compile("(?:^|_)(?:PASSWORD|PASSWD|SECRET|TOKEN|KEY|CREDENTIALS?)(?:_|$)(?!FILE|PATH)", re.IGNORECASE)
"""Names of environment variables that contain a secret, such as HF_TOKEN."""


@dataclass(frozen=True)
class Run:
    """What a manifest is rendered from."""

    job: Job
    site: Site
    settings: str
    """The recipe, as YAML."""
    since: int = field(default_factory=lambda: int(time.time()))
    """Unix time from which attempts without progress count."""

    def __post_init__(self) -> None:
        if self.job.nodes[0] != self.job.nodes[1]:
            raise SlurmError(f"--nodes {self.job.node_range}: give one number, a manifest has no range")
        found = "the recipe" if redact(self.settings) != self.settings else None
        for name, value in self.site.environment.items():
            if SECRET.search(name) or redact(value) != value:
                found = f"site file: environment.{name}"
        if found:
            raise SlurmError(
                f"{found} contains a secret, which the manifest would contain too: leave it out, and name a secret with"
                " the credentials in kubernetes.secrets or skypilot.secrets"
            )

    @property
    def name(self) -> str:
        """The run's name as Kubernetes and SkyPilot allow it. SlurmError if nothing is left of it, or too much."""
        name = re.sub("[^a-z0-9]+", "-", self.job.name.lower()).strip("-")
        name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
        if len(name) > LONGEST_NAME:
            raise SlurmError(f"name={self.job.name}: longer than {LONGEST_NAME} characters; set another name=")
        return name

    def image(self, own: str | None, key: str) -> str:
        """The image `own` of the setting `key`, else that of pyxis. SlurmError if it is a file."""
        container = self.site.container
        image = own or (container.image if container and container.kind == "pyxis" else None)
        if image is None:
            raise SlurmError(f"site file: set {key} to the image to run in; there is no container.image of pyxis")
        image = re.sub("^[a-z]+://", "", image).replace("#", "/")
        if image.startswith(("/", ".", "~")) or image.endswith((".sqsh", ".sif")):
            raise SlurmError(f"site file: {image} is a file: set {key} to an image of a registry")
        return image

    def script(self, recipe_file: str, node: str, master: str, again: int) -> str:
        """The script of one node.

        recipe_file: path of the recipe on the node. node, master: words of the shell for the node's number and for
        node 0's HOST:PORT. again: exit code of a retryable attempt.
        """
        python = self.site.container.python if self.site.container else "python3"
        # An image has no environment modules, and a folder of its own for temporary files.
        inside = {"container": Container(kind="pyxis", image="", python=python), "modules": [], "scratch": None}
        words = {"recipe_file": recipe_file, "node": node, "master": master, "since": self.since, "again": again}
        return render(self.job, self.site.model_copy(update=inside), TEMPLATE, **words)


def to_yaml(*documents: dict[str, Any]) -> str:
    """One YAML file, with texts of several lines as blocks."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
