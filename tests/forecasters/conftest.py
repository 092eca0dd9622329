import pytest

from tests.forecasters.trajectories import Data, drifting


@pytest.fixture(scope="session")
def data() -> Data:
    return drifting(seed=0)
