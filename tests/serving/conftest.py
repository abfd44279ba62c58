import pytest

for package in ("fastapi", "uvicorn", "openai", "llguidance"):
    pytest.importorskip(package)

from tests.serving.servers import served, tiny_service  # noqa: E402


@pytest.fixture(scope="session")
def service():
    found = tiny_service()
    yield found
    found.stop()


@pytest.fixture(scope="session")
def address(service):
    with served(service, stop_with_app=False) as found:
        yield found


@pytest.fixture(scope="session")
def client(address):
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as found:
        yield found
