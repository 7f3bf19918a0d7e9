package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"holdfast/bridge/wire"
	"holdfast/spool"
)

// Bounds of a look into a lane.
const (
	shownPage = 1 << 20 // of all payloads of a page, bytes
)

func (s *Server) listLanes(c *call) error {
	l := LaneList{Lanes: s.p.Lanes.Lanes()}
	if l.Lanes == nil {
		l.Lanes = []spool.LaneStat{}
	}
	return c.reply(http.StatusOK, l)
}

var errPageFull = errors.New("page is full")

func (s *Server) listMessages(c *call) error {
	after, err := c.number("after")
	if err != nil {
		return err
	}
	limit, err := c.limit()
	if err != nil {
		return err
	}
	page := MessagePage{Messages: []Message{}}
	size, more := 0, false
	from := after + 1
	if from == 0 {
		return c.reply(http.StatusOK, page) // after is the largest number there is
	}
	err = s.p.Lanes.Peek(c.path("lane"), from, limit+1, func(seq uint64, r *spool.Record) error {
		if len(page.Messages) == limit || size >= shownPage {
			more = true
			return errPageFull
		}
		m := s.message(c.path("lane"), seq, r)
		size += min(m.Size, shownPayload)
		page.Messages = append(page.Messages, m)
		return nil
	})
	if err != nil && !errors.Is(err, errPageFull) {
		return err
	}
	if more {
		page.Next = strconv.FormatUint(page.Messages[len(page.Messages)-1].Seq, 10)
	}
	return c.reply(http.StatusOK, page)
}

// purge drops messages. What is to go has to be said: nothing at all would be everything.
func (s *Server) purge(c *call) error {
	var b PurgeRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	lane := c.path("lane")
	c.object = lane
	some := b.OlderThan != "" || b.UpTo != 0
	if b.Parked {
		if some || b.All {
			return failf(codeBadBody, "parked goes with upstream and nothing else: all that is parked of the lane goes")
		}
		gone, err := s.p.Lanes.PurgeParked(lane, b.Upstream)
		if err != nil {
			return err
		}
		c.detail = fmt.Sprintf("%d parked messages", gone.Messages)
		return c.reply(http.StatusOK, Purged{Lane: lane, Purged: gone})
	}
	if b.All == some || b.Upstream != "" {
		return failf(codeBadBody, "say which messages are to go: older_than, up_to or both; or all, or parked, and nothing else")
	}
	var before time.Time
	if b.OlderThan != "" {
		at, timeErr := time.Parse(time.RFC3339, b.OlderThan)
		age, ageErr := time.ParseDuration(b.OlderThan)
		switch {
		case timeErr == nil:
			before = at
		case ageErr == nil && age >= 0:
			before = time.Now().Add(-age)
		default:
			return failf(codeBadBody, "older_than is %.64q: it is an age such as 72h, or a time such as 2026-05-04T03:02:01Z", b.OlderThan)
		}
	}
	gone, err := s.p.Lanes.Purge(lane, before, b.UpTo)
	if err != nil {
		return err
	}
	c.detail = fmt.Sprintf("%d messages", gone.Messages)
	return c.reply(http.StatusOK, Purged{Lane: lane, Purged: gone})
}

// message shows r, of which it keeps nothing.
func (s *Server) message(lane string, seq uint64, r *spool.Record) Message {
	epoch, _, _ := s.p.Lanes.EpochOf(lane, seq)
	m := Message{
		Seq: seq, ID: wire.ID(s.cfg.Gateway, epoch, lane, seq), Device: string(r.Device), Topic: string(r.Topic),
		Received: time.UnixMilli(r.Received).UTC(),
		Retain:   r.Flags&spool.FlagRetain != 0, Will: r.Flags&spool.FlagWill != 0, Unsynced: r.Flags&spool.FlagClockUnsynced != 0,
	}
	switch {
	case r.Flags&spool.FlagQoS2 != 0:
		m.QoS = 2
	case r.Flags&spool.FlagQoS1 != 0:
		m.QoS = 1
	}
	kind := ""
	if r.Props != nil {
		kind = r.Props.ContentType
	}
	m.Content = content(r.Payload, kind)
	return m
}

func (s *Server) history(c *call) error {
	var since time.Time
	if v := c.query.Get("since"); v != "" {
		var err error
		if since, err = time.Parse(time.RFC3339, v); err != nil {
			return failf(codeBadQuery, "query: since is %.64q: it is a time such as 2026-05-04T03:02:01Z", v)
		}
	}
	h := s.p.Source.History(since)
	if h.Points == nil {
		h.Points = []HistoryPoint{}
	}
	return c.reply(http.StatusOK, h)
}

func (s *Server) listAlarms(c *call) error {
	l := AlarmList{Alarms: s.p.Source.Status().Alarms}
	if l.Alarms == nil {
		l.Alarms = []Alarm{}
	}
	return c.reply(http.StatusOK, l)
}

func (s *Server) listUpstreams(c *call) error {
	l := UpstreamList{Upstreams: s.p.Source.Status().Upstreams}
	if l.Upstreams == nil {
		l.Upstreams = []Upstream{}
	}
	return c.reply(http.StatusOK, l)
}
