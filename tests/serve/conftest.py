"""A server on tiny models in fp64, so that a row alone and in company draws the same tokens."""

import contextlib
from importlib.util import find_spec

import pytest
import torch
from small_model import saved
from text_model import source

from hope_kernels import HopeForCausalLM, Tokenizer, convert

if find_spec("fastapi") is None or find_spec("httpx") is None or find_spec("uvicorn") is None:
    collect_ignore_glob = ["test_*.py"]  # the extra serve is not installed


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Of a byte model."""
    found = saved(tmp_path_factory.mktemp("bytes"))
    HopeForCausalLM.from_pretrained(found, dtype=torch.float64).save_pretrained(found)
    return found


@pytest.fixture(scope="session")
def model(folder):
    return HopeForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model with a tokenizer and a chat template."""
    from hope_kernels.cli.sources import Source

    found = Source(str(source(tmp_path_factory.mktemp("talker"))), quiet=True)
    model = convert.llama(found.model(torch.float64), 16, lr=0.05, relative=False)
    model.text_files = found.text_files()
    return model


@pytest.fixture
def serve(tmp_path):
    """serve(model, **settings): a client of a running service, whose sessions lie in ``tmp_path / "sessions"``."""
    from fastapi.testclient import TestClient

    from hope_kernels.serve.api import Service, application
    from hope_kernels.serve.settings import Settings

    with contextlib.ExitStack() as stack:
        def begin(model, **settings):
            service = Service(model, Tokenizer.of(model), "m", str(tmp_path / "sessions"), Settings(**settings))
            service.start()
            stack.callback(service.close, 0)
            client = TestClient(application(service, {"testserver"}), raise_server_exceptions=False)
            client.service = service
            return client

        yield begin
