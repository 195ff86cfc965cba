// Triton says 400 where a model says UNAVAILABLE. This makes 503 of it, which nginx can send to another server.

const NOT_NOW = /^\{"error":"(in ensemble '[^']*', )?UNAVAILABLE: /;

// nginx has thrown the words of the 400 away. So the server is asked once more, and its answer read whole. If it has gone
// meanwhile, another server may be asked: whoever says 400 has not begun the request.
async function refused(r) {
    const reply = await r.subrequest('/again' + r.uri, { method: 'POST' });
    const words = reply.responseText || '';
    const error = words.replace(/^data: /, '').trim();
    if (reply.status >= 500 || !words) {
        later(r, '{"error":"UNAVAILABLE: the server has gone, please try again"}');
    } else if (reply.status == 400 && NOT_NOW.test(error)) {
        later(r, error);
    } else {
        answer(r, reply.status, words, reply.headersOut['Content-Type']);
    }
}

function later(r, error) {
    r.headersOut['Retry-After'] = '1';
    answer(r, 503, error);
}

function answer(r, status, text, type) {
    r.headersOut['Content-Type'] = type || 'application/json';
    r.return(status, text);
}

export default { refused };
