package httpapi

import (
	"encoding/json"
	"errors"
	"sync"
	"time"
)

// Bounds of a stream of messages. Nobody reads more; a program that wants all of them subscribes.
const (
	livePause = 100 * time.Millisecond // between two batches
	liveBatch = 50                     // messages
	liveBytes = 1 << 20                // of payloads that wait for the next batch
)

// watchMessages is GET /messages/live.
func (s *Server) watchMessages(c *call) error {
	filter := c.query.Get("filter")
	if filter == "" {
		filter = "#"
	}
	q := &arrivals{wake: make(chan struct{}, 1)}
	end, err := s.p.Messages.Watch(filter, q.put)
	if errors.Is(err, ErrFilter) {
		return failf(codeBadQuery, "query: filter %.64q: %v", filter, err)
	}
	if err != nil {
		return err
	}
	defer end()
	out, err := s.openStream(c)
	if err != nil || out == nil {
		return err
	}
	defer out.close()
	out.buf = append(out.buf, '\n')
	for out.send() && out.rest(livePause) {
		switch out.wait(q.wake) {
		case streamEnds:
			return nil
		case streamBeats:
			out.buf = append(out.buf, ": still here\n\n"...)
		case streamWakes:
			out.buf = q.take(out.buf)
		}
	}
	return nil
}

// arrivals are messages on their way to one reader. What it cannot take is counted and dropped: it holds up nobody.
type arrivals struct {
	wake chan struct{} // cap 1: there is something

	mu     sync.Mutex // guards what follows
	queue  []arrival
	bytes  int    // of the payloads in queue
	missed uint64 // since the last of queue
}

type arrival struct {
	*Arrival
	missed uint64 // right before it
}

func (q *arrivals) put(a *Arrival) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue) >= liveBatch || len(q.queue) > 0 && q.bytes+len(a.Payload) > liveBytes {
		q.missed++
		return
	}
	q.queue = append(q.queue, arrival{a, q.missed})
	q.bytes += len(a.Payload)
	q.missed = 0
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take appends what waits as events.
func (q *arrivals) take(dst []byte) []byte {
	q.mu.Lock()
	all := q.queue
	q.queue, q.bytes = nil, 0
	q.mu.Unlock()
	for _, a := range all {
		data, err := json.Marshal(&LiveMessage{
			Device: a.Device, Topic: a.Topic, Received: a.Received.UTC(), QoS: int(a.QoS), Retain: a.Retain, Missed: a.missed,
			Content: content(a.Payload, a.ContentType),
		})
		if err != nil { // a time before year 0
			continue
		}
		dst = append(append(append(dst, "event: message\ndata: "...), data...), "\n\n"...)
	}
	return dst
}
