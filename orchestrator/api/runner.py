"""aiohttp's server with problem documents also where no middleware reaches."""

from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from orchestrator.api.problems import answer_or_problem, client_has_gone, problem_response, unexpected_response

_log = structlog.get_logger(__name__)


class ProblemRequestHandler(web.RequestHandler):
    """Answers what the HTTP parser refuses: there is no request then, only a stand-in for one."""

    __slots__ = ()

    def data_received(self, data: bytes) -> None:
        """Also end a body that turns out to be malformed while a handler reads it.

        aiohttp 3.14 only queues the error behind that request, whose handler would wait for the rest of its body until
        the client hangs up.
        """
        super().data_received(data)
        request = self._current_request
        if self._messages and request is not None and not request.content.is_eof():
            error = getattr(self._messages[-1][0], "exc", None)
            if isinstance(error, HttpProcessingError):
                request.content.set_exception(web.RequestPayloadError(str(error)))
                self.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - the parser's text, which repeats what it read
    ) -> web.StreamResponse:
        """Called by aiohttp for parser errors and for what escaped every handler. Closes the connection."""
        if request.writer.output_size > 0 or client_has_gone(request):
            # An answer has begun, or nobody waits for one; all that is left is to break it off, as the base class does.
            raise ConnectionError("no answer can be sent")
        if isinstance(exc, HttpProcessingError):
            _log.info("malformed request", remote=request.remote, kind=type(exc).__name__)
            answer = problem_response(
                request,
                status=status,
                code="malformed-request",
                title="The request is not HTTP",
                detail=_parser_detail(exc),
            )
        else:
            answer = unexpected_response(request, exc)
        answer.force_close()
        return answer


def _parser_detail(error: HttpProcessingError) -> str:
    known = {
        "LineTooLong": "The request line or a header is too long.",
        "BadStatusLine": "The request line is malformed.",
        "BadHttpMethod": "The request's method is malformed.",
        "InvalidHeader": "A header is malformed.",
        "InvalidURLError": "The URL is malformed.",
        "TransferEncodingError": "The chunked request body is malformed.",
        "ContentLengthError": "The request body does not have the length that it announced.",
        "ContentEncodingError": "The request body's Content-Encoding cannot be decoded.",
    }
    return known.get(type(error).__name__, "The request is malformed.")


class ProblemServer(web.Server):
    """Makes a `ProblemRequestHandler` for each connection."""

    def __call__(self) -> web.RequestHandler:
        return ProblemRequestHandler(self, loop=self._loop, **self._kwargs)


class ProblemAppRunner(web.AppRunner):
    """Use instead of `web.AppRunner`. The application still needs `setup_problems`.

    aiohttp has no option for the class of a connection's handler. So the server that it built is built once more, from
    its own parts, as a `ProblemServer`: `_make_server`, `_kwargs` and `_loop` are what this relies on beyond its API.
    """

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        built = await super()._make_server()
        application = built.request_handler

        async def handle(request: Any) -> web.StreamResponse:
            # The router and the `Expect` header are dealt with before the first middleware.
            return await answer_or_problem(request, application)

        return ProblemServer(
            handle,
            request_factory=built.request_factory,
            handler_cancellation=built.handler_cancellation,
            loop=built._loop,  # noqa: SLF001
            **built._kwargs,  # noqa: SLF001
        )
