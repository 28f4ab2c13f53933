"""Where cloud and device are really apart: wire, cloud service, device client, and the executor of one request's plan."""

from cda4rec_jax.runtime.clock import NO_DELAY as NO_DELAY
from cda4rec_jax.runtime.clock import LinkRealisation as LinkRealisation
from cda4rec_jax.runtime.clock import realised_link as realised_link
from cda4rec_jax.runtime.cloud_service import CloudService as CloudService
from cda4rec_jax.runtime.device_client import DeviceClient as DeviceClient
from cda4rec_jax.runtime.executor import Answer as Answer
from cda4rec_jax.runtime.executor import Executor as Executor
from cda4rec_jax.runtime.executor import ExecutorConfig as ExecutorConfig
from cda4rec_jax.runtime.executor import Prediction as Prediction
from cda4rec_jax.runtime.executor import Request as Request
from cda4rec_jax.runtime.functions import CloudFunctions as CloudFunctions
from cda4rec_jax.runtime.functions import DeviceFunctions as DeviceFunctions
