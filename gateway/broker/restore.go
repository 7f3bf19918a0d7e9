package broker

import (
	"encoding/hex"
	"errors"
	"io"
	"math"
	"syscall"
	"time"

	"holdfast/internal/kv"
	"holdfast/internal/mqtt"
)

func isEOF(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

// isSilent says that the kernel has given the peer up; see Config.SilenceTimeout.
func isSilent(err error) bool {
	return errors.Is(err, syscall.ETIMEDOUT) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH)
}

// restore reads sessions, subscriptions, packet ids, retained messages and wills. A row that
// can not be read is skipped, reported and left where it is: one damaged row is no reason not
// to start. Rows that belong to nothing are removed.
func (b *Broker) restore() error {
	now, start := time.Now(), b.clock.Read()
	// ago is the same moment as t in the time of this process.
	ago := func(t int64) time.Time {
		return now.Add(-time.Duration(max(b.clock.Between(t, start.T), 0)) * time.Millisecond)
	}
	var ops []kv.Op
	drop := func(key []byte) { ops = append(ops, kv.Op{Key: append([]byte{}, key...), Delete: true}) }
	bad := 0
	skip := func(key []byte, err error) {
		if bad++; bad <= 20 {
			b.log.Warn("row skipped", "key", hex.EncodeToString(key), "err", err)
		}
	}
	scan := func(prefix []byte, f func(key, value []byte) error) error {
		return b.store.Scan(prefix, func(key, value []byte) error {
			if err := f(key, value); err != nil {
				skip(key, err)
			}
			return nil
		})
	}

	err := scan([]byte{kv.PrefixSession, keySession}, func(key, value []byte) error {
		var row sessionRow
		if err := row.decode(value); err != nil {
			return err
		}
		id := string(key[2:])
		from := ago(row.disconnectedT)
		if row.disconnected == 0 || row.disconnectedT == 0 {
			// It was connected when the gateway ended, so its time begins now; or the row does not tell since when it is not.
			from = now
			row.disconnected, row.disconnectedT = max(start.Wall, 1), start.T
			ops = append(ops, kv.Op{Key: sessionKey(id), Value: row.encode()})
		}
		s := &session{b: b, id: id, stored: true, version: row.version, era: row.era, expiry: row.expiry, who: row.who}
		s.left, s.endsAt = from, from.Add(time.Duration(row.expiry)*time.Second)
		b.sessions[id] = s
		return nil
	})
	if err != nil {
		return err
	}
	err = scan([]byte{kv.PrefixSession, keySubscription}, func(key, value []byte) error {
		id, filter, err := cutIDPart(key[2:])
		if err != nil {
			return err
		}
		s := b.sessions[id]
		if s == nil {
			drop(key)
			return nil
		}
		sub := newSubscription(string(filter))
		if err := sub.decode(value); err != nil {
			return err
		}
		if !mqtt.ValidFilter(sub.filter) {
			return errors.New("no topic filter")
		}
		sub.answered = true
		s.subs = append(s.subs, sub)
		b.index(id, &sub)
		return nil
	})
	if err != nil {
		return err
	}
	err = scan([]byte{kv.PrefixQoS2}, func(key, value []byte) error {
		id, rest, err := cutIDPart(key[1:])
		if err != nil || len(rest) != 10 {
			return errors.New("key is cut short")
		}
		if err := checkVersion(value, 1); err != nil {
			return err
		}
		s := b.sessions[id]
		if s == nil || string(rest[:8]) != string(appendQoS2Key(nil, id, s.era, 0)[3+len(id):][:8]) {
			drop(key) // of a session that was cleared or has ended
			return nil
		}
		if s.rx == nil {
			s.rx = map[uint16]*rx{}
		}
		s.rx[uint16(rest[8])<<8|uint16(rest[9])] = &rx{state: rxReceived}
		return nil
	})
	if err != nil {
		return err
	}
	err = scan([]byte{kv.PrefixRetained}, func(key, value []byte) error {
		m, t, known, err := decodeRetained(value)
		if err != nil {
			return err
		}
		if m.topic != string(key[1:]) {
			return errors.New("topic is not that of the key")
		}
		switch {
		case known:
			m.at = ago(t)
		case m.pub.HasExpiry:
			ops = append(ops, m.retainedOp(start.T)) // else it would begin anew at each start
		}
		if _, over := m.expired(now); over {
			drop(key)
			return nil
		}
		b.retained.setLocked(m) // nobody else is there yet
		return nil
	})
	if err != nil {
		return err
	}
	err = scan([]byte{kv.PrefixWill}, func(key, value []byte) error {
		m, t, delay, known, err := decodeWill(value)
		if err != nil {
			return err
		}
		due := ago(t).Add(time.Duration(delay) * time.Second)
		if !known { // t is when it is due, by a wall clock: let it be no later than any will can be
			due = now.Add(time.Duration(min(max(t-start.Wall, 0), b.cfg.SessionExpiryMax.Milliseconds())) * time.Millisecond)
		}
		id := string(key[1:])
		s := b.sessions[id]
		if s == nil {
			// Its session is over, and with it the wait.
			s = &session{b: b, id: id}
			b.sessions[id] = s
			due = now
		}
		w := &will{message: m.pub, delay: 1}
		w.message.QoS, w.message.Retain = m.qos, m.retain
		s.waiting = &pendingWill{will: w, due: due}
		return nil
	})
	if err != nil {
		return err
	}
	if bad > 0 {
		b.log.Warn("rows skipped", "rows", bad)
	}
	if len(b.sessions) > 0 || b.retained.count > 0 {
		b.log.Info("sessions restored", "sessions", len(b.sessions), "subscriptions", b.subs.count.Load(), "retained", b.retained.count)
	}
	return b.applyRestored(ops)
}

// applyRestored hands in the rows that restore changes, some at a time.
func (b *Broker) applyRestored(ops []kv.Op) error {
	const some = 1000
	for len(ops) > 0 {
		n := min(some, len(ops))
		if err := b.store.Apply(ops[:n], nil, 0); err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}

// startTimers has restored sessions and wills run out.
func (b *Broker) startTimers() {
	b.eachSession(func(s *session) {
		if s.conn != nil || s.gone {
			return
		}
		if s.waiting != nil && s.waiting.timer == nil {
			s.startWillLocked()
		}
		if s.timer == nil && s.expiry != math.MaxUint32 {
			s.timer = time.AfterFunc(time.Until(s.endsAt), s.expire)
		}
	})
}

func (b *Broker) stopTimers() {
	b.eachSession(func(s *session) {
		if s.timer != nil {
			s.timer.Stop()
		}
		if s.waiting != nil && s.waiting.timer != nil {
			s.waiting.timer.Stop()
		}
	})
}

func (b *Broker) eachSession(f func(*session)) {
	b.sessMu.RLock()
	all := make([]*session, 0, len(b.sessions))
	for _, s := range b.sessions {
		all = append(all, s)
	}
	b.sessMu.RUnlock()
	for _, s := range all {
		s.mu.Lock()
		f(s)
		s.mu.Unlock()
	}
}
