package httpapi

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"holdfast/spool"
)

func (s *Server) listParked(c *call) error {
	limit, err := c.limit()
	if err != nil {
		return err
	}
	lane, upstream := c.query.Get("lane"), c.query.Get("upstream")
	at, err := readParkedAt(c.query.Get("after"))
	if err != nil {
		return err
	}
	from := at.lane
	if from == "" {
		from = lane
	}
	if from == "" {
		from = spool.SystemLane
	}
	page := ParkedPage{Messages: []ParkedMessage{}}
	size := 0
	err = s.p.Lanes.ParkedFrom(from, at.seq, func(m spool.ParkedMessage) error {
		switch {
		case m.Lane == at.lane && m.Seq == at.seq && m.Upstream <= at.upstream:
			return nil
		case lane != "" && m.Lane != lane:
			return errPageFull // lanes come one after the other
		case upstream != "" && m.Upstream != upstream:
			return nil
		}
		if len(page.Messages) == limit || size >= shownPage {
			last := &page.Messages[len(page.Messages)-1]
			page.Next = parkedAt{last.Lane, last.Seq, last.Upstream}.String()
			return errPageFull
		}
		shown := ParkedMessage{Lane: m.Lane, Upstream: m.Upstream, ParkedAt: time.UnixMilli(m.AtMS).UTC(), Reason: m.Reason}
		var r spool.Record
		if _, err := spool.ParseRecord(m.Record, &r); err != nil {
			shown.Message, shown.Unreadable = Message{Seq: m.Seq, Content: Content{Size: len(m.Record)}}, true
		} else {
			shown.Message = s.message(m.Lane, m.Seq, &r)
		}
		size += min(shown.Size, shownPayload)
		page.Messages = append(page.Messages, shown)
		return nil
	})
	if err != nil && !errors.Is(err, errPageFull) {
		return err
	}
	return c.reply(http.StatusOK, page)
}

// parkedAt is a parked message's, as next names it.
type parkedAt struct {
	lane     string
	seq      uint64
	upstream string
}

func (p parkedAt) String() string {
	return p.lane + "/" + strconv.FormatUint(p.seq, 10) + "/" + p.upstream
}

// readParkedAt reads what String wrote. No lane contains a slash.
func readParkedAt(s string) (p parkedAt, err error) {
	if s == "" {
		return p, nil
	}
	lane, rest, ok := strings.Cut(s, "/")
	number, upstream, ok2 := strings.Cut(rest, "/")
	seq, err := strconv.ParseUint(number, 10, 64)
	if !ok || !ok2 || lane == "" || err != nil {
		return p, failf(codeBadQuery, "query: after is not the next of a page before")
	}
	return parkedAt{lane, seq, upstream}, nil
}

func (s *Server) replayParked(c *call) error {
	var b ReplayRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	c.object = fmt.Sprintf("%.64s/%.64s", b.Upstream, b.Lane)
	switch {
	case b.Lane == "" || b.Upstream == "":
		return failf(codeBadBody, "body: lane and upstream are needed: GET /api/v1/parked shows both")
	case b.Seqs != nil && len(b.Seqs) == 0:
		return failf(codeBadBody, "body: seqs is empty: leave it out to replay all")
	}
	n, err := s.p.Lanes.Replay(b.Lane, b.Upstream, b.Seqs)
	c.detail = fmt.Sprintf("%d messages", n)
	done := Replayed{Replayed: n}
	switch {
	case errors.Is(err, spool.ErrFull):
		return failf(codeLaneFull, "%d replayed; the others stay parked: %v", n, err)
	case errors.Is(err, spool.ErrRecord), errors.Is(err, spool.ErrTooLarge):
		done.Problem = err.Error()
	case err != nil:
		return err
	}
	return c.reply(http.StatusOK, done)
}
