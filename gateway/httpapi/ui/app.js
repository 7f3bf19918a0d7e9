'use strict';
// The one script of the dashboard: it asks the API that programs use, and shows what it says. Everything that comes from outside is put in as text.

const csrf = document.querySelector('meta[name=csrf]').content;
const page = document.body.dataset.page, id = document.body.dataset.id, role = document.body.dataset.role;
const operator = role === 'operator' || role === 'admin', admin = role === 'admin';
const $ = (s) => document.querySelector(s);

// h makes an element; what is not an element among its children is text.
function h(tag, props, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(props || {})) {
    if (k === 'on') for (const [ev, fn] of Object.entries(v)) e.addEventListener(ev, fn);
    else if (k in e && k !== 'list') e[k] = v; else e.setAttribute(k, v);
  }
  e.append(...children.filter((c) => c !== null && c !== undefined));
  return e;
}

function note(text, bad) {
  const p = h('p', { className: bad ? 'bad' : 'good' }, text);
  $('#notes').replaceChildren(p);
  setTimeout(() => { if (p.isConnected) p.remove(); }, bad ? 15000 : 6000);
}

async function api(path, method, body) {
  const o = { method: method || 'GET', headers: { Accept: 'application/json' }, credentials: 'same-origin' };
  if (o.method !== 'GET') o.headers['X-Holdfast-CSRF'] = csrf;
  if (body !== undefined) { o.body = JSON.stringify(body); o.headers['Content-Type'] = 'application/json'; }
  let r;
  try { r = await fetch(path.startsWith('/') ? path : '/api/v1/' + path, o); } catch { throw new Error('the gateway does not answer'); }
  if (r.status === 401) { location.assign('/signin?next=' + encodeURIComponent(location.pathname)); throw new Error('signed out'); }
  if (r.status === 204) return null;
  const data = await r.json().catch(() => null);
  if (!r.ok) throw new Error(data && data.error ? data.error.message : 'answer ' + r.status);
  return data;
}

// tried runs what a button does; while it runs the button cannot be pressed again.
function tried(button, fn) {
  return async (ev) => {
    ev.preventDefault();
    button.disabled = true;
    try { await fn(); } catch (e) { note(e.message, true); } finally { button.disabled = false; }
  };
}

const number = (n) => (n === undefined || n === null ? '–' : n.toLocaleString('en'));
function bytes(n) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let i = 0;
  while (n >= 1024 && i < units.length - 1) { n /= 1024; i++; }
  return (i && n < 10 ? n.toFixed(1) : Math.round(n)) + ' ' + units[i];
}
function span(s) {
  if (!isFinite(s) || s < 0) return '–';
  if (s < 90) return Math.round(s) + ' s';
  if (s < 5400) return Math.round(s / 60) + ' min';
  if (s < 129600) return Math.round(s / 3600) + ' h';
  return Math.round(s / 86400) + ' d';
}
const since = (t) => (t ? span((Date.now() - new Date(t)) / 1000) : '–');
const when = (t) => (t ? h('time', { dateTime: t, title: t }, new Date(t).toLocaleString()) : '–');
const word = (text, cls) => h('span', { className: cls || '' }, text);
const good = ['SUCCEEDED', 'DELIVERED'], bad = ['FAILED', 'REJECTED', 'EXPIRED', 'TIMED_OUT', 'DEAD_LETTERED'];
const state = (s) => word(s, good.includes(s) ? 'good' : bad.includes(s) ? 'bad' : '');

// table fills a table: heads are texts, with a leading # for numbers.
function table(el, heads, rows, empty) {
  if (!rows.length) { el.replaceChildren(h('tbody', {}, h('tr', {}, h('td', {}, empty || 'Nothing.')))); return; }
  el.replaceChildren(
    h('thead', {}, h('tr', {}, ...heads.map((t) => h('th', { scope: 'col', className: t.startsWith('#') ? 'num' : '' }, t.replace('#', ''))))),
    h('tbody', {}, ...rows.map((r) => h('tr', {}, ...r.map((c, i) => h('td', { className: heads[i].startsWith('#') ? 'num' : typeof c === 'string' && c.length > 40 ? 'any' : '' }, c))))));
}

function facts(el, list) { el.replaceChildren(...list.map(([k, v]) => h('div', {}, h('dt', {}, k), h('dd', {}, v)))); }

// live opens a stream, that of events if nothing else is said, and comes back by itself; the browser does, unless the answer was an error.
// It gives what ends it.
function live(kinds, fn, back, path) {
  const link = $('#link');
  let es, wait = 1000, lost = false, ended = false;
  const open = () => {
    if (ended) return;
    es = new EventSource('/api/v1/' + (path || 'events'));
    es.onopen = () => { link.textContent = 'live'; link.className = 'state good'; wait = 1000; if (lost) { lost = false; back(); } };
    es.onerror = () => {
      lost = true;
      link.textContent = 'gateway away, trying again'; link.className = 'state bad';
      if (es.readyState === EventSource.CLOSED) {
        setTimeout(async () => { try { await api('status'); } catch { /* it says so when it is back */ } open(); }, wait);
        wait = Math.min(wait * 2, 15000);
      }
    };
    for (const k of kinds) es.addEventListener(k, (e) => { try { fn(k, JSON.parse(e.data)); } catch (err) { note(err.message, true); } });
    es.addEventListener('reset', () => back());
  };
  open();
  return () => { ended = true; es.close(); link.textContent = 'stopped'; link.className = 'state'; };
}

// soon runs fn a little later, once for many calls.
function soon(fn, ms) {
  let t = 0;
  return () => { if (!t) t = setTimeout(async () => { t = 0; try { await fn(); } catch { /* the line at the top says it */ } }, ms); };
}

// paged fills a table page by page: load(next) gives {rows, next}.
function paged(el, heads, load, empty) {
  let rows = [], next = '';
  const more = $('#more');
  const show = () => { table(el, heads, rows, empty); if (more) more.hidden = !next; };
  const fresh = async () => { const p = await load(''); rows = p.rows; next = p.next || ''; show(); };
  if (more) more.addEventListener('click', tried(more, async () => { const p = await load(next); rows = rows.concat(p.rows); next = p.next || ''; show(); }));
  return fresh;
}
const query = (o) => new URLSearchParams(Object.entries(o).filter(([, v]) => v)).toString();

const start = {
  overview() {
    let last = null, newest = '';
    const at = [], taken = [], gone = [], half = [], most = [], charts = [];
    const plot = (el, lines, data) => {
      const dark = matchMedia('(prefers-color-scheme: dark)').matches, ink = dark ? '#a7b0b9' : '#555d66', blue = dark ? '#7fd0e4' : '#0b5a6e', green = dark ? '#7fd695' : '#1a6b2f';
      const line = { stroke: dark ? '#39414a' : '#d0d5da', width: 1 }, axis = { stroke: ink, grid: line, ticks: line };
      const c = new uPlot({ width: el.clientWidth, height: 190, axes: [axis, { ...axis, size: 60 }], series: [{}, { label: lines[0], stroke: blue, width: 2 }, { label: lines[1], stroke: green, width: 2 }],
        scales: { x: { range: (_, from, to) => (at.length ? [Math.min(from, to - 300), to] : [Date.now() / 1000 - 300, Date.now() / 1000]) }, y: { range: (_, from, to) => [0, to > 0 ? to * 1.1 : 1] } } }, data, el);
      addEventListener('resize', () => c.setSize({ width: el.clientWidth, height: 190 }));
      return c;
    };
    const draw = async () => {
      const p = await api('history?' + query({ since: newest }));
      if (!p.points.length && charts.length) return;
      for (const q of p.points) {
        const t = new Date(q.at) / 1000;
        if (at.length && t - at[at.length - 1] > 3 * p.every_s) { at.push(at[at.length - 1] + p.every_s); for (const l of [taken, gone, half, most]) l.push(null); } // it was away: no line
        at.push(t); taken.push(q.accepted); gone.push(q.delivered); half.push(q.ack_p50_s ? q.ack_p50_s * 1000 : null); most.push(q.ack_p99_s ? q.ack_p99_s * 1000 : null);
        newest = q.at;
      }
      while (at.length && at[0] < at[at.length - 1] - 3600) for (const l of [at, taken, gone, half, most]) l.shift();
      if (!charts.length) charts.push(plot($('#chart'), ['taken in', 'delivered'], [at, taken, gone]), plot($('#acks'), ['half within', '99 % within'], [at, half, most]));
      else { charts[0].setData([at, taken, gone]); charts[1].setData([at, half, most]); }
    };
    let drawn = 0;
    const look = async () => {
      const s = await api('status'), now = Date.now() / 1000;
      const sum = (f) => s.ledger.accounts.reduce((n, a) => n + f(a).messages, 0);
      const accepted = s.lanes.reduce((n, l) => n + l.accepted.messages, 0), delivered = sum((a) => a.delivered), pending = sum((a) => a.pending);
      const rates = {};
      let inRate = 0, outRate = 0;
      if (last && s.started_at === last.s.started_at) {
        const dt = now - last.now;
        inRate = Math.max(accepted - last.accepted, 0) / dt; outRate = Math.max(delivered - last.delivered, 0) / dt;
        for (const a of s.ledger.accounts) {
          const b = last.s.ledger.accounts.find((x) => x.lane === a.lane && x.upstream === a.upstream);
          if (b) rates[a.upstream + '/' + a.lane] = { in: (a.accepted.messages - b.accepted.messages) / dt, out: (a.delivered.messages - b.delivered.messages) / dt };
        }
      }
      if (now - drawn > 9) { drawn = now; await draw(); }
      last = { s, now, accepted, delivered };
      facts($('#facts'), [
        ['State', s.ready ? word('ready', 'good') : word(s.not_ready, 'bad')], ['Up for', span(s.uptime_s)], ['Version', s.version],
        ['Devices', `${number(s.devices.connected)} of ${number(s.devices.registered)} connected`], ['Taken in', number(accepted)], ['Waiting', number(pending)],
        ['Per second', `${inRate.toFixed(1)} in, ${outRate.toFixed(1)} out`], ['On disk', `${bytes(s.store.bytes)}, ${bytes(s.store.free_bytes)} free`],
      ]);
      $('#ledger').replaceChildren(s.ledger.balanced ? word(`Every one of ${number(sum((a) => a.accepted))} accepted messages is in exactly one account.`, 'good')
        : word('The accounts do not balance: please report this.', 'bad'));
      table($('#lanes'), ['Lane', 'Upstream', '#Waiting', '#Size', '#Delivered', '#Expired', '#Evicted', '#Parked', 'Oldest', 'Empty in'], s.ledger.accounts.map((a) => {
        const r = rates[a.upstream + '/' + a.lane], net = r ? r.out - r.in : 0;
        return [a.lane, a.upstream || '(none)', number(a.pending.messages), bytes(a.pending.bytes), number(a.delivered.messages), number(a.expired.messages),
          number(a.evicted.messages), number(a.parked.messages), a.oldest ? span((new Date(s.clock.wall) - new Date(a.oldest)) / 1000) : '–', !a.upstream ? '–' : a.pending.messages === 0 ? 'empty' : net > 0 ? span(a.pending.messages / net) : 'not yet'];
      }), 'No message has come yet.');
      table($('#upstreams'), ['Upstream', 'Link', 'For', 'Address', '#In flight', '#Acknowledged', 'Last error'], s.upstreams.map((u) => [u.name,
        word(u.state, u.connected ? 'good' : 'bad'), since(u.since), u.url, number(u.in_flight), number(u.acked_messages), u.last_error || '–']),
      'No upstream is configured: messages are kept by the limits of their lanes.');
      $('#warnings').hidden = !s.alarms.length;
      $('#warnings ul').replaceChildren(...s.alarms.map((a) => h('li', { className: a.severity === 'critical' ? 'bad' : 'warn' }, a.text)));
    };
    const again = soon(look, 200);
    live(['upstream', 'device', 'alarm'], again, again);
    return [look, 2000];
  },

  devices() {
    const form = $('#filter');
    const fresh = paged($('#devices'), ['Id', 'Name', 'Presence', 'Last seen', 'Last message', 'State', ''], async (after) => {
      const p = await api('devices?' + query({ search: form.search.value, connected: form.connected.value, enabled: form.enabled.value, after, limit: 100 }));
      return { next: p.next, rows: p.devices.map((d) => [h('a', { href: '/devices/' + encodeURIComponent(d.id) }, d.id), d.name || '',
        d.presence.connected ? word('connected', 'good') : 'away', when(d.presence.last_seen), when(d.presence.last_message), d.enabled ? 'enabled' : word('disabled', 'warn'), operator ? toggle(d, () => fresh()) : '']) };
    }, 'No device.');
    const again = soon(fresh, 400);
    form.addEventListener('input', again);
    form.addEventListener('submit', (e) => e.preventDefault());
    const add = $('#add');
    if (add) add.addEventListener('submit', tried(add.querySelector('button'), async () => {
      const made = await api('devices', 'POST', { id: add.elements.id.value, name: add.elements.name.value });
      secret(made.secret, add.elements.id.value); add.reset(); await fresh();
    }));
    live(['device'], again, again);
    return [fresh, 0];
  },

  device() {
    const base = 'devices/' + encodeURIComponent(id);
    const look = async () => {
      const d = await api(base), p = d.presence;
      facts($('#facts'), [['Name', d.name || '–'], ['Role', d.role], ['State', d.enabled ? word('enabled', 'good') : word('disabled', 'warn')],
        ['Presence', p.connected ? word('connected for ' + since(p.since), 'good') : 'away'], ['Last seen', when(p.last_seen)], ['Last message', when(p.last_message)], ['Address', p.address || '–'],
        ['Labels', Object.entries(d.labels || {}).map(([k, v]) => k + '=' + v).join(', ') || '–'], ['Credentials', number((d.credentials || []).length)]]);
      if (operator) { $('#enable').hidden = d.enabled; $('#disable').hidden = !d.enabled; }
    };
    const list = paged($('#commands'), ['Submitted', 'Name', 'State', 'Progress', 'Reason', ''], async (before) => {
      const p = await api(base + '/commands?' + query({ before, limit: 50 }));
      return { next: p.next, rows: p.commands.map((c) => [when(c.created), c.name, state(c.state), c.progress ? (c.progress.percent ?? '') + ' ' + (c.progress.text || '') : '', c.reason || '', buttons(c, () => list())]) };
    }, 'No command yet.');
    const fresh = async () => { await look(); await list(); };
    if (operator) {
      for (const [b, on] of [['#enable', true], ['#disable', false]]) $(b).addEventListener('click', tried($(b), async () => { await api(base, 'PATCH', { enabled: on }); await look(); }));
      const form = $('#send');
      form.addEventListener('submit', tried(form.querySelector('button'), async () => {
        let payload = form.payload.value;
        try { payload = JSON.parse(payload); } catch { /* it is text */ }
        const body = { name: form.elements.name.value, ttl: form.ttl.value };
        if (form.payload.value) body.payload = payload;
        await api(base + '/commands', 'POST', body);
        note('The command is on disk.'); await list();
      }));
    }
    if ($('#rotate')) $('#rotate').addEventListener('click', tried($('#rotate'), async () => { const m = await api(base + '/credentials', 'POST', {}); secret(m.secret, id); await look(); }));
    const again = soon(fresh, 150);
    live(['command', 'device'], (k, e) => { if ((e.command && e.command.device === id) || (e.device && e.device.id === id)) again(); }, again);
    return [fresh, 0];
  },

  commands() {
    const form = $('#filter');
    const fresh = paged($('#commands'), ['Submitted', 'Device', 'Name', 'State', 'Reason', ''], async (before) => {
      const p = await api('commands?' + query({ state: form.state.value, before, limit: 100 }));
      return { next: p.next, rows: p.commands.map((c) => [when(c.created), h('a', { href: '/devices/' + encodeURIComponent(c.device) }, c.device), c.name, state(c.state), c.reason || '', buttons(c, () => fresh())]) };
    }, 'No command.');
    form.addEventListener('input', soon(fresh, 100));
    const again = soon(fresh, 500);
    live(['command'], again, again);
    return [fresh, 0];
  },

  messages() {
    const select = $('#filter').lane;
    let fresh = async () => {};
    const fill = async () => {
      const l = await api('lanes');
      select.replaceChildren(...l.lanes.map((x) => h('option', {}, x.name)));
      select.value = l.lanes.some((x) => x.name === 'telemetry') ? 'telemetry' : l.lanes[0].name;
    };
    fresh = paged($('#messages'), ['#Sequence', 'Received', 'Device', 'Topic', '#Size', 'Payload'], async (after) => {
      if (!select.value) await fill();
      const p = await api(`lanes/${encodeURIComponent(select.value)}/messages?` + query({ after, limit: 50 }));
      return { next: p.next, rows: p.messages.map((m) => [number(m.seq), when(m.received), m.device, m.topic, bytes(m.size), payload(m)]) };
    }, 'Nothing waits.');
    select.addEventListener('input', soon(fresh, 50));
    live([], () => {}, fresh);
    return [fresh, 0];
  },

  live() {
    const form = $('#filter'), stop = $('#stop'), list = $('#tail');
    let end = null, seen = 0, missed = 0;
    const count = () => { $('#count').textContent = `${number(seen)} shown${missed ? `, ${number(missed)} not: more came than a page takes` : ''}.`; };
    const show = (m) => {
      seen++; missed += m.missed || 0;
      list.prepend(h('tr', {}, h('td', {}, new Date(m.received).toLocaleTimeString()), h('td', {}, m.device), h('td', { className: 'any' }, m.topic), h('td', { className: 'num' }, bytes(m.size)), h('td', { className: 'any' }, readable(m))));
      while (list.childElementCount > 200) list.lastElementChild.remove();
      count();
    };
    const begin = async () => {
      if (end) end();
      const path = 'messages/live?' + query({ filter: form.filter.value || '#' });
      stop.disabled = false; seen = missed = 0; list.replaceChildren(); count();
      end = live(['message'], (_, m) => show(m), () => {}, path);
    };
    form.addEventListener('submit', tried(form.querySelector('button'), begin));
    stop.addEventListener('click', () => { end(); stop.disabled = true; });
    return [begin, 0];
  },

  alarms() {
    const fresh = async () => {
      const l = await api('alarms');
      table($('#alarms'), ['Severity', 'Since', 'Alarm', 'What, and what to do'], l.alarms.map((a) => [word(a.severity, a.severity === 'critical' ? 'bad' : 'warn'), when(a.since), a.object ? a.name + ' ' + a.object : a.name, a.text]), 'Nothing needs a look.');
    };
    const again = soon(fresh, 150);
    live(['alarm'], again, again);
    return [fresh, 15000];
  },

  parked() {
    const fresh = paged($('#parked'), ['Parked', 'Lane', '#Sequence', 'Upstream', 'Reason', 'Topic', 'Payload', ''], async (after) => {
      const p = await api('parked?' + query({ after, limit: 50 }));
      return { next: p.next, rows: p.messages.map((m) => {
        const b = operator && !m.unreadable ? h('button', {}, 'Replay') : '';
        if (b) b.addEventListener('click', tried(b, async () => { await api('parked/replay', 'POST', { lane: m.lane, upstream: m.upstream, seqs: [m.seq] }); note('It is back in its lane.'); await fresh(); }));
        return [when(m.parked_at), m.lane, number(m.seq), m.upstream, m.reason, m.topic, payload(m), b];
      }) };
    }, 'No upstream has refused anything.');
    live([], () => {}, fresh);
    return [fresh, 0];
  },
};

// readable is a payload as people read it: JSON is set out.
function readable(m) {
  if (m.payload === undefined || m.truncated || !/^\s*[[{]/.test(m.payload)) return payload(m);
  try { return h('pre', {}, JSON.stringify(JSON.parse(m.payload), null, 1)); } catch { return payload(m); }
}
const payload = (m) => (m.payload_cbor ? 'CBOR: ' + m.payload_cbor : m.payload !== undefined ? m.payload : m.payload_base64 ? 'base64: ' + m.payload_base64 : '') + (m.truncated ? ' …' : '');

function secret(text, device) {
  $('#secret').replaceChildren(text ? 'Credential of ' + device + ', shown this once: ' : '', text ? h('code', {}, text) : '');
}

function toggle(d, done) {
  const b = h('button', {}, d.enabled ? 'Disable' : 'Enable');
  b.setAttribute('aria-label', (d.enabled ? 'Disable ' : 'Enable ') + d.id);
  b.addEventListener('click', tried(b, async () => { await api('devices/' + encodeURIComponent(d.id), 'PATCH', { enabled: !d.enabled }); await done(); }));
  return b;
}

// buttons of a command: what has no end can be canceled, what has one can be sent again.
function buttons(c, done) {
  if (!operator) return '';
  const open = ['QUEUED', 'SENT', 'DELIVERED', 'IN_PROGRESS'].includes(c.state) && !(c.one_way && c.state === 'DELIVERED');
  const b = h('button', {}, open ? 'Cancel' : 'Send again');
  b.addEventListener('click', tried(b, async () => {
    if (open) await api('commands/' + encodeURIComponent(c.id), 'DELETE');
    else {
      const full = await api('commands/' + encodeURIComponent(c.id)), body = { name: full.name, ttl: full.ttl };
      if (full.payload !== undefined) body.payload = full.payload; else if (full.payload_base64) body.payload_base64 = full.payload_base64;
      if (full.content_type) body.content_type = full.content_type;
      await api('devices/' + encodeURIComponent(c.device) + '/commands', 'POST', body);
    }
    await done();
  }));
  return b;
}

(async () => {
  const [look, every] = start[page]();
  const run = async () => { try { await look(); } catch (e) { if (!every) note(e.message, true); } };
  await run();
  document.body.dataset.ready = 'true';
  if (every) setInterval(() => { if (!document.hidden) run(); }, every);
})();
