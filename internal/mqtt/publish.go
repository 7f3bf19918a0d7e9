package mqtt

// Publish is a PUBLISH packet (MQTT 5.0 §3.3). Parsed, its slices alias the frame.
type Publish struct {
	Dup     bool
	Retain  bool
	QoS     byte
	ID      uint16 // packet identifier, never 0 with QoS 1 and 2, always 0 with QoS 0
	Topic   []byte // empty: the topic that Alias stands for
	Payload []byte

	// The rest is MQTT 5 only. Slices are nil where the property is absent.

	Alias         uint16 // topic alias; 0: none
	UTF8          bool   // payload format indicator 1; whether the payload is UTF-8 is not checked
	HasExpiry     bool
	Expiry        uint32 // message expiry interval, seconds
	ContentType   []byte
	ResponseTopic []byte
	Correlation   []byte
	// SubscriptionIDs come from servers only. ParseDelivery reuses their room, so that a
	// Publish parsed into again and again allocates none.
	SubscriptionIDs []uint32
	// Props: parsed, all properties raw. To encode, its user properties are taken and the
	// others left out, since the fields above give them.
	Props Properties
}

var errAliasMissing = violation("", "topic name is empty and there is no topic alias")

// ParsePublish reads a PUBLISH that a client sent into p, whose old contents it replaces.
// It allocates nothing on success. Checked is all of §3.3 but what the connection knows:
// whether Alias is within the maximum and already has a topic.
func ParsePublish(frame []byte, v Version, p *Publish) error {
	return parsePublish(frame, v, p, FromClient)
}

// ParseDelivery reads a PUBLISH that a server sent: there subscription identifiers are allowed.
func ParseDelivery(frame []byte, v Version, p *Publish) error {
	return parsePublish(frame, v, p, FromServer)
}

func parsePublish(frame []byte, v Version, p *Publish, from Side) error {
	*p = Publish{SubscriptionIDs: p.SubscriptionIDs[:0]}
	r, err := open(frame, TypePublish, v)
	if err != nil {
		return err
	}
	p.Dup = frame[0]&flagDup != 0
	p.Retain = frame[0]&flagRetain != 0
	p.QoS = frame[0] & flagQoS >> 1
	p.Topic = r.binary()
	if p.QoS > 0 {
		p.ID = r.id()
	}
	if v == V5 {
		p.parseProperties(&r, from)
	}
	if r.err != nil {
		return r.err
	}
	p.Payload = r.b
	if len(p.Topic) == 0 {
		switch {
		case p.Alias != 0:
			return nil
		case v == V5:
			return errAliasMissing
		}
	}
	if err := checkTopic(p.Topic); err != nil {
		return err
	}
	return nil
}

func (p *Publish) parseProperties(r *reader, from Side) {
	w := r.properties(1 << TypePublish)
	for {
		x, ok := w.next()
		if !ok {
			break
		}
		switch x.ID {
		case PropPayloadFormat:
			p.UTF8 = x.Int == 1
		case PropMessageExpiry:
			p.HasExpiry, p.Expiry = true, x.Int
		case PropTopicAlias:
			p.Alias = uint16(x.Int)
		case PropResponseTopic:
			if len(x.Data) == 0 || scan(x.Data)&hasWildcard != 0 {
				w.fail(errResponseTopic)
			}
			p.ResponseTopic = x.Data
		case PropCorrelationData:
			p.Correlation = x.Data
		case PropContentType:
			p.ContentType = x.Data
		case PropSubscriptionID:
			if from == FromClient {
				w.fail(errPropSubIDFrom)
				break
			}
			p.SubscriptionIDs = append(p.SubscriptionIDs, x.Int)
		default: // user properties stay in Props
		}
	}
	p.Props = w.into(r)
}

// AppendPublish appends p as a packet of version v. It allocates nothing but what dst lacks.
func AppendPublish(dst []byte, v Version, p *Publish) []byte {
	first := byte(TypePublish)<<4 | p.QoS<<1
	if p.Dup {
		first |= flagDup
	}
	if p.Retain {
		first |= flagRetain
	}
	// The length is measured first, so that the payload is copied once.
	size := 2 + len(p.Topic) + len(p.Payload)
	if p.QoS > 0 {
		size += 2
	}
	props := 0
	if v == V5 {
		props = p.propertiesLen()
		size += varintLen(props) + props
	}
	dst = append(dst, first)
	dst = appendVarint(dst, size)
	dst = appendText(dst, p.Topic)
	if p.QoS > 0 {
		dst = appendID(dst, p.ID)
	}
	if v == V5 {
		dst = appendVarint(dst, props)
		if props > 0 {
			dst = p.appendProperties(dst)
		}
	}
	return append(dst, p.Payload...)
}

// PublishSize is the length of what AppendPublish appends for p.
func PublishSize(v Version, p *Publish) int {
	size := 2 + len(p.Topic) + len(p.Payload)
	if p.QoS > 0 {
		size += 2
	}
	if v == V5 {
		props := p.propertiesLen()
		size += varintLen(props) + props
	}
	return 1 + varintLen(size) + size
}

func (p *Publish) propertiesLen() (n int) {
	if p.UTF8 {
		n += 2
	}
	if p.HasExpiry {
		n += 5
	}
	if p.Alias != 0 {
		n += 3
	}
	if p.ResponseTopic != nil {
		n += 3 + len(p.ResponseTopic)
	}
	if p.Correlation != nil {
		n += 3 + len(p.Correlation)
	}
	if p.ContentType != nil {
		n += 3 + len(p.ContentType)
	}
	for _, id := range p.SubscriptionIDs {
		n += 1 + varintLen(int(id))
	}
	if len(p.Props) > 0 {
		n += userLen(p.Props)
	}
	return n
}

func (p *Publish) appendProperties(dst []byte) []byte {
	if p.UTF8 {
		dst = append(dst, byte(PropPayloadFormat), 1)
	}
	if p.HasExpiry {
		dst = appendU32Prop(dst, PropMessageExpiry, p.Expiry)
	}
	if p.Alias != 0 {
		dst = appendU16Prop(dst, PropTopicAlias, p.Alias)
	}
	if p.ResponseTopic != nil {
		dst = appendTextProp(dst, PropResponseTopic, p.ResponseTopic)
	}
	if p.Correlation != nil {
		dst = appendTextProp(dst, PropCorrelationData, p.Correlation)
	}
	if p.ContentType != nil {
		dst = appendTextProp(dst, PropContentType, p.ContentType)
	}
	for _, id := range p.SubscriptionIDs {
		dst = appendVarint(append(dst, byte(PropSubscriptionID)), int(id))
	}
	return appendUser(dst, p.Props)
}
