"""deploy/kubernetes, compared with the schemas of Kubernetes."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate  # type: ignore[import-not-found, import-untyped, unused-ignore]
import yaml

from tests.deploy.report import Report
from tests.fixtures.processes import ROOT

#: The oldest version with available schemas, and the newest.
_VERSIONS = ("1.25", kubernetes_validate.latest_version())


def check_manifests(report: Report) -> None:
    """Validate strictly: an unknown field is an error.

    A manifest with a misspelled field shows that the check can fail.
    """
    documents = [
        document
        for path in sorted((ROOT / "deploy/kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]
    with report.check(f"the manifests agree with the schemas of Kubernetes {' and '.join(_VERSIONS)}"):
        assert documents
        for document in documents:
            for version in _VERSIONS:
                kubernetes_validate.validate(document, version, strict=True)

    with report.check("a manifest with a misspelled field does not"):
        wrong: dict[str, Any] = copy.deepcopy(documents[0])
        wrong["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
        try:
            kubernetes_validate.validate(wrong, _VERSIONS[1], strict=True)
        except kubernetes_validate.ValidationError:
            return
        raise AssertionError("it was accepted")
