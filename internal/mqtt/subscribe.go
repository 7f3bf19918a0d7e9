package mqtt

// Subscribe is a SUBSCRIBE packet (MQTT 5.0 §3.8).
type Subscribe struct {
	ID             uint16
	SubscriptionID uint32 // MQTT 5; 0: none
	Filters        []Subscription
	Props          Properties // as in Publish
}

// Subscription is one filter of a SUBSCRIBE with its options (MQTT 5.0 §3.8.3.1). In 3.1.1
// there is only QoS.
type Subscription struct {
	Filter            string
	QoS               byte
	NoLocal           bool
	RetainAsPublished bool
	RetainHandling    byte // 0: send retained messages, 1: only if the subscription is new, 2: never
}

// Unsubscribe is an UNSUBSCRIBE packet (MQTT 5.0 §3.10).
type Unsubscribe struct {
	ID      uint16
	Filters []string
	Props   Properties // as in Publish
}

// Suback is a SUBACK or an UNSUBACK (MQTT 5.0 §3.9, §3.11). In 3.1.1 the one has the return
// codes 0, 1, 2 and 0x80 as reasons, the other has none.
type Suback struct {
	ID           uint16
	Reasons      []Reason
	ReasonString string     // "": none
	Props        Properties // as in Publish
}

var (
	errSubscribeNone    = violation("MQTT-3.8.3-2 / MQTT-3.8.3-3", "SUBSCRIBE without a topic filter")
	errSubscribeBits    = malformed("MQTT-3.8.3-5 / MQTT-3.8.3-4", "reserved bits of the subscription options are set")
	errSubscribeQoS     = violation("§3.8.3.1 / MQTT-3.8.3-4", "QoS 3 in the subscription options")
	errRetainHandling   = violation("§3.8.3.1", "retain handling 3")
	errNoLocalShared    = violation("MQTT-3.8.3-4", "no local on a shared subscription")
	errUnsubscribeNone  = violation("MQTT-3.10.3-2", "UNSUBSCRIBE without a topic filter")
	errSubackReason     = violation("MQTT-3.9.3-2", "reason code is not one of SUBACK")
	errUnsubackReason   = violation("MQTT-3.11.3-2", "reason code is not one of UNSUBACK")
	errSubackNoReason   = violation("MQTT-3.9.3-1", "acknowledgement without a reason code")
	errUnsubackWithMore = malformed("", "UNSUBACK of MQTT 3.1.1 with a payload")
)

// ParseSubscribe reads a SUBSCRIBE.
func ParseSubscribe(frame []byte, v Version) (*Subscribe, error) {
	r, err := open(frame, TypeSubscribe, v)
	if err != nil {
		return nil, err
	}
	s := &Subscribe{ID: r.id()}
	if v == V5 {
		w := r.properties(1 << TypeSubscribe)
		for {
			x, ok := w.next()
			if !ok {
				break
			}
			if x.ID == PropSubscriptionID {
				s.SubscriptionID = x.Int
			}
		}
		s.Props = clone(w.into(&r))
	}
	if r.err == nil && len(r.b) == 0 {
		return nil, errSubscribeNone
	}
	for len(r.b) > 0 {
		filter := r.filter()
		options := r.u8()
		if r.err == nil {
			r.err = checkOptions(filter, options, v)
		}
		if r.err == nil {
			s.Filters = append(s.Filters, Subscription{
				Filter:            string(filter),
				QoS:               options & 3,
				NoLocal:           options&4 != 0,
				RetainAsPublished: options&8 != 0,
				RetainHandling:    options >> 4 & 3,
			})
		}
	}
	if err := r.end(); err != nil {
		return nil, err
	}
	return s, nil
}

// filter gives a topic filter.
func (r *reader) filter() []byte {
	filter := r.binary()
	if r.err == nil {
		if err := checkFilter(filter); err != nil {
			r.fail(err)
		}
	}
	return filter
}

func checkOptions(filter []byte, options byte, v Version) *Error {
	reserved := byte(0xC0)
	if v != V5 {
		reserved = 0xFC
	}
	switch {
	case options&3 == 3:
		return errSubscribeQoS
	case options&reserved != 0:
		return errSubscribeBits
	case options>>4&3 == 3:
		return errRetainHandling
	case options&4 != 0 && isShared(filter):
		return errNoLocalShared
	}
	return nil
}

// AppendSubscribe appends s.
func AppendSubscribe(dst []byte, v Version, s *Subscribe) []byte {
	dst, mark := begin(dst, TypeSubscribe, 2)
	dst = appendID(dst, s.ID)
	if v == V5 {
		var props int
		dst, props = room(dst)
		if s.SubscriptionID != 0 {
			dst = appendVarint(append(dst, byte(PropSubscriptionID)), int(s.SubscriptionID))
		}
		dst = seal(appendUser(dst, s.Props), props)
	}
	for i := range s.Filters {
		f := &s.Filters[i]
		options := f.QoS
		if v == V5 {
			options |= f.RetainHandling << 4
			if f.NoLocal {
				options |= 4
			}
			if f.RetainAsPublished {
				options |= 8
			}
		}
		dst = append(appendText(dst, f.Filter), options)
	}
	return seal(dst, mark)
}

// ParseUnsubscribe reads an UNSUBSCRIBE.
func ParseUnsubscribe(frame []byte, v Version) (*Unsubscribe, error) {
	r, err := open(frame, TypeUnsubscribe, v)
	if err != nil {
		return nil, err
	}
	u := &Unsubscribe{ID: r.id()}
	if v == V5 {
		props, _ := r.skipProperties(1 << TypeUnsubscribe)
		u.Props = clone(props)
	}
	if r.err == nil && len(r.b) == 0 {
		return nil, errUnsubscribeNone
	}
	for len(r.b) > 0 {
		if filter := r.filter(); r.err == nil {
			u.Filters = append(u.Filters, string(filter))
		}
	}
	if err := r.end(); err != nil {
		return nil, err
	}
	return u, nil
}

// AppendUnsubscribe appends u.
func AppendUnsubscribe(dst []byte, v Version, u *Unsubscribe) []byte {
	dst, mark := begin(dst, TypeUnsubscribe, 2)
	dst = appendID(dst, u.ID)
	if v == V5 {
		var props int
		dst, props = room(dst)
		dst = seal(appendUser(dst, u.Props), props)
	}
	for _, f := range u.Filters {
		dst = appendText(dst, f)
	}
	return seal(dst, mark)
}

// ParseSuback reads a SUBACK.
func ParseSuback(frame []byte, v Version) (*Suback, error) {
	return parseSuback(frame, TypeSuback, v)
}

// ParseUnsuback reads an UNSUBACK.
func ParseUnsuback(frame []byte, v Version) (*Suback, error) {
	return parseSuback(frame, TypeUnsuback, v)
}

func parseSuback(frame []byte, t Type, v Version) (*Suback, error) {
	r, err := open(frame, t, v)
	if err != nil {
		return nil, err
	}
	s := &Suback{ID: r.id()}
	if v == V5 {
		props, reason := r.skipProperties(1 << t)
		s.Props, s.ReasonString = clone(props), string(reason)
	}
	switch {
	case r.err != nil:
		return nil, r.err
	case t == TypeUnsuback && v != V5:
		if len(r.b) > 0 {
			return nil, errUnsubackWithMore
		}
		return s, nil
	case len(r.b) == 0:
		return nil, errSubackNoReason
	}
	for _, c := range r.b {
		reason := Reason(c)
		switch {
		case t == TypeUnsuback:
			if !reason.allowed(inUnsuback) {
				return nil, errUnsubackReason
			}
		case !reason.allowed(inSuback), v != V5 && c > 2 && c != 0x80:
			return nil, errSubackReason
		}
		s.Reasons = append(s.Reasons, reason)
	}
	return s, nil
}

// AppendSuback appends s as a SUBACK.
func AppendSuback(dst []byte, v Version, s *Suback) []byte {
	return appendSuback(dst, TypeSuback, v, s)
}

// AppendUnsuback appends s as an UNSUBACK.
func AppendUnsuback(dst []byte, v Version, s *Suback) []byte {
	return appendSuback(dst, TypeUnsuback, v, s)
}

func appendSuback(dst []byte, t Type, v Version, s *Suback) []byte {
	dst, mark := begin(dst, t, 0)
	dst = appendID(dst, s.ID)
	if v == V5 {
		var props int
		dst, props = room(dst)
		if s.ReasonString != "" {
			dst = appendTextProp(dst, PropReasonString, s.ReasonString)
		}
		dst = seal(appendUser(dst, s.Props), props)
	}
	if v == V5 || t == TypeSuback {
		for _, reason := range s.Reasons {
			if v != V5 && reason.Failed() {
				reason = UnspecifiedError // the only failure that 3.1.1 knows
			}
			dst = append(dst, byte(reason))
		}
	}
	return seal(dst, mark)
}
