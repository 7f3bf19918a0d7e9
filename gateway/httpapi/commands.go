package httpapi

import (
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"holdfast/bridge/wire"
	"holdfast/devices"
	"holdfast/internal/audit"
)

const maxReason = 512 // bytes

func (s *Server) listDeviceCommands(c *call) error {
	if _, err := s.p.Devices.Get(c.path("id")); err != nil {
		return err
	}
	return s.commandPage(c, c.path("id"))
}

func (s *Server) listCommands(c *call) error { return s.commandPage(c, c.query.Get("device")) }

func (s *Server) commandPage(c *call, device string) (err error) {
	f := devices.CommandFilter{Device: device}
	if f.Limit, err = c.limit(); err != nil {
		return err
	}
	if f.Before, err = c.number("before"); err != nil {
		return err
	}
	if v := c.query.Get("state"); v != "" {
		for name := range strings.SplitSeq(v, ",") {
			var st devices.State
			if err := st.UnmarshalText([]byte(name)); err != nil {
				return failf(codeBadQuery, "query: state %.64q: there is none of this name; there are %s", name, strings.Join(stateNames(), ", "))
			}
			f.States = append(f.States, st)
		}
	}
	list, next, err := s.p.Commands.List(f)
	if err != nil {
		return err
	}
	page := CommandPage{Commands: make([]Command, len(list))}
	for i := range list {
		page.Commands[i] = NewCommand(&list[i], false)
	}
	if next > 0 {
		page.Next = strconv.FormatUint(next, 10)
	}
	return c.reply(http.StatusOK, page)
}

// stateNames lists the states of a command.
func stateNames() []string {
	var names []string
	for st := devices.Queued; st.String() != devices.State(0).String(); st++ {
		names = append(names, st.String())
	}
	return names
}

func (s *Server) sendCommand(c *call) error {
	wait, err := c.duration("wait")
	if err != nil {
		return err
	}
	b, kind, err := c.body(false, typeJSON, typeCBOR)
	if err != nil {
		return err
	}
	if err := begins(b, kind); err != nil {
		return err
	}
	sub, err := wire.DecodeSubmit(b)
	if err != nil {
		return failf(codeBadBody, "body: %v", err)
	}
	if key := c.r.Header.Get("Idempotency-Key"); key != "" {
		if sub.ID != "" && sub.ID != key {
			return failf(codeBadBody, "id is %.64q and the header Idempotency-Key is %.64q: give one, or the same twice", sub.ID, key)
		}
		sub.ID = key
	}
	pos := s.p.Events.now() // before it is looked at: see awaitEnd
	req := Request(c.path("id"), &sub)
	req.Source = "api " + c.who
	cmd, repeat, err := s.p.Commands.SubmitWait(c.r.Context(), &req)
	if err != nil {
		return err
	}
	c.object += "/" + cmd.ID
	c.detail = sub.Name
	c.w.Header().Set("Location", "/api/v1/commands/"+url.PathEscape(cmd.ID))
	if wait > 0 {
		if !repeat {
			c.w.code = http.StatusCreated
		}
		if err := s.note(c, audit.Done); err != nil { // it is done, whatever the wait brings
			return err
		}
		// What was taken is taken, even if it cannot be read again.
		if now, err := s.awaitEnd(c, cmd.ID, pos, wait); err == nil {
			cmd = now
		}
	}
	if repeat {
		return c.reply(http.StatusOK, NewCommand(&cmd, true))
	}
	return c.reply(http.StatusCreated, NewCommand(&cmd, true))
}

// Request is what the queue is asked for when somebody submits s for a device, whichever way s came.
func Request(device string, s *wire.Submit) devices.Request {
	r := devices.Request{
		ID: s.ID, Device: device, Name: s.Name, Payload: s.Payload, ContentType: s.ContentType, TTL: time.Duration(s.TTL),
		NotBefore: s.NotBefore.Time, ExecutionTimeout: time.Duration(s.ExecutionTimeout), MaxAttempts: s.MaxAttempts, OneWay: s.OneWay,
		Urgent: s.Urgent, SupersedeKey: s.SupersedeKey, Feedback: devices.Feedback(s.Feedback),
	}
	if s.HasTTL && r.TTL <= 0 {
		r.TTL = -1 // over before it began: for the queue to refuse. 0 would be the default.
	}
	return r
}

// begins holds the first byte of a command against what its header calls it: the decoder goes by that byte.
func begins(b []byte, kind string) error {
	text := strings.TrimLeft(string(b[:min(len(b), 64)]), " \t\r\n")
	switch {
	case text == "":
		return failf(codeBadBody, "body is empty: send a command, at least {\"name\": …}")
	case kind == typeJSON && text[0] != '{':
		return failf(codeBadBody, "body is no JSON object, but Content-Type says %s", kind)
	case kind == typeCBOR && b[0] < 0xa0: // not a map, nor a tag before one (RFC 8949 §3.1)
		return failf(codeBadBody, "body is no CBOR map, but Content-Type says %s", kind)
	}
	return nil
}

func (s *Server) getCommand(c *call) error {
	wait, err := c.duration("wait")
	if err != nil {
		return err
	}
	cmd, err := s.awaitEnd(c, c.path("id"), s.p.Events.now(), wait)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, NewCommand(&cmd, true))
}

func (s *Server) cancelCommand(c *call) error {
	body := CancelRequest{Reason: c.query.Get("reason")}
	b, _, err := c.body(true, typeJSON)
	if err != nil {
		return err
	}
	if b != nil {
		if err := decodeStrict(b, &body); err != nil {
			return err
		}
	}
	if len(body.Reason) > maxReason {
		return failf(devices.CodeInvalid, "reason has %d bytes, the most are %d", len(body.Reason), maxReason)
	}
	c.detail = body.Reason
	cmd, err := s.p.Commands.CancelWait(c.r.Context(), c.path("id"), body.Reason)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, NewCommand(&cmd, true))
}
