from __future__ import annotations

import pytest

from runner import errors
from runner.request.model import Container
from tests.unit.request.messages import decoded


def told(request, words):
    return any(words in line for line in request.warnings)


def wanted(artifacts=None, image=None, **experiment):
    config = {} if image is None else {"container": {"image": image}}
    return decoded({"artifacts": artifacts or {}} | experiment, config)


@pytest.mark.parametrize(
    ("tag", "address", "engine", "reference"),
    [
        ("_docker", {"qualified": "docker://python:3.11"}, "docker", "docker://python:3.11"),
        ("_docker", {"qualified": "python:3.11"}, "docker", "python:3.11"),
        ("_docker", {"qualified": "-v /:/host"}, "docker", "-v /:/host"),  # the executor refuses it
        ("_docker", {"qualified": "s3://host:9000/b/image.tar"}, "docker", ""),
        ("_docker", {"qualified": "file:///srv/image.tar"}, "docker", ""),
        ("_docker", {"qualified": "/srv/image.tar"}, "docker", ""),
        ("_docker", {"url": "https://host/image.tar"}, "docker", ""),
        ("_docker", {"key": "images/image.tar"}, "docker", ""),
        ("_singularity", {"qualified": "shub://a/b"}, "singularity", "shub://a/b"),
        ("_singularity", {"qualified": "dockerhub://a/b"}, "singularity", "dockerhub://a/b"),
        ("_singularity", {"qualified": "DOCKER://a/b"}, "singularity", "DOCKER://a/b"),
        ("_singularity", {"qualified": "library://a/b"}, "singularity", "library://a/b"),
        ("_singularity", {"qualified": "s3://host:9000/b/image.sif"}, "singularity", ""),
        ("_singularity", {"key": "images/image.sif"}, "singularity", ""),
    ],
)
def test_an_artifact_names_an_image_by_reference_or_is_its_file(tag, address, engine, reference):
    request = wanted({tag: address | {"mutable": True}})
    assert request.container == Container(engine=engine, reference=reference, tag=tag)
    artifact = request.artifact(tag)
    assert artifact is not None
    assert (artifact.mutable, artifact.unpack) == (False, False)  # one file, and nobody's result
    assert told(request, "an image is never stored back")


def test_an_image_that_is_packed_in_an_archive_is_unpacked():
    artifact = wanted({"_singularity": {"key": "a.tar", "unpack": True}}).artifact("_singularity")
    assert artifact is not None
    assert artifact.unpack is True


def test_the_configuration_names_one_and_an_artifact_wins():
    assert wanted(image=" python:3.11 ").container == Container(engine="docker", reference="python:3.11")
    request = wanted({"_singularity": {"qualified": "shub://a/b"}}, image="python:3.11")
    assert request.container is not None
    assert request.container.engine == "singularity"
    assert told(request, "container.image is ignored: the artifact _singularity names another image")


@pytest.mark.parametrize("image", ["", "  ", None, [], {}, False])
def test_no_image(image):
    odd = decoded({}, {"container": {"image": image}}).container
    assert odd is None or odd.reference == "false"
    assert decoded({}, {"container": image}).container is None
    assert wanted({"_docker": {}}).container is None
    assert wanted({"_docker": None, "_singularity": {"local": "/x.simg"}}).container is None


def test_two_images_are_refused():
    with pytest.raises(errors.UnsupportedRequest, match="names two container images"):
        wanted({"_docker": {"qualified": "a"}, "_singularity": {"qualified": "shub://a/b"}})


def test_an_image_may_have_the_program():
    assert wanted(image="a", filename=None).filename is None
    assert wanted({"_docker": {"qualified": "a"}}, filename=None).filename is None
    with pytest.raises(errors.UnsupportedRequest, match="nothing to run"):
        wanted({"_docker": {}}, filename=None)
    with pytest.raises(errors.UnsupportedRequest, match=r"config\.container\.image holds a NUL"):
        wanted(image="a\0b")
