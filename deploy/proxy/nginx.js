// Triton says 400 where a model says UNAVAILABLE. This makes 503 of it, which nginx can send to another server.

const NOT_NOW = /^\{"error":"(in ensemble '[^']*', )?UNAVAILABLE: /;

// nginx has thrown the words of the 400 away. So the server is asked once more, and its answer read whole.
async function refused(r) {
    const reply = await r.subrequest('/again' + r.uri, { method: 'POST' });
    const words = reply.responseText || '{"error":"the server ended before it answered; it may have begun the request"}';
    const error = words.replace(/^data: /, '').trim();
    if (reply.status == 400 && NOT_NOW.test(error)) {
        r.headersOut['Retry-After'] = '1';
        answer(r, 503, error);
    } else {
        answer(r, reply.status, words, reply.headersOut['Content-Type']);
    }
}

function answer(r, status, text, type) {
    r.headersOut['Content-Type'] = type || 'application/json';
    r.return(status, text);
}

export default { refused };
